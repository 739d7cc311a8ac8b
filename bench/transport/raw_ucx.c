// How fast can one process read another's memory by UCX over TCP? The measure for kvstore's UCX
// mover: nothing but libucp, both sides polling without rest. Its settings and its protocol with
// the bench are as raw_tcp.c's, of which this differs by
//
//   raw_ucx serve ADDRESS DEVICE SEGMENT SOURCE_FILE          prints {"hello": "..."}
//   raw_ucx read ADDRESS HELLO DEVICE SEGMENT SOURCE_FILE TARGET_BYTES
//
// ADDRESS is not used: UCX takes the device's. Ends of peers are detected, as in anything that is
// meant to run for long.

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

enum { CALLS_MAX = 4096, BATCH_MAX = 1024, BYTES_MAX = 16384 };

static void fail(const char *what, const char *why) {
    fprintf(stderr, "raw_ucx: %s: %s\n", what, why);
    exit(1);
}

static void check(const char *what, ucs_status_t status) {
    if (status != UCS_OK) {
        fail(what, ucs_status_string(status));
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static char *touched_memory(size_t bytes) {
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail("mmap", strerror(errno));
    }
    memset(memory, 1, bytes);
    return memory;
}

static const char *open_source(const char *path, size_t *bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        fail(path, strerror(errno));
    }
    *bytes = (size_t)status.st_size;
    const char *mapped = mmap(NULL, *bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        fail(path, strerror(errno));
    }
    return mapped;
}

static FILE *answers;  // what was stdout, to which UCX prints its complaints
static ucp_context_h context;
static ucp_worker_h worker;

static void start(const char *device, const char *segment) {
    ucp_config_t *config;
    check("ucp_config_read", ucp_config_read(NULL, NULL, &config));
    check("TLS", ucp_config_modify(config, "TLS", "tcp"));
    check("NET_DEVICES", ucp_config_modify(config, "NET_DEVICES", device));
    // 1.13 knows them without the prefix, later ones with it, and either takes both.
    ucp_config_modify(config, "TX_SEG_SIZE", segment);
    ucp_config_modify(config, "RX_SEG_SIZE", segment);
    ucp_config_modify(config, "TCP_TX_SEG_SIZE", segment);
    ucp_config_modify(config, "TCP_RX_SEG_SIZE", segment);
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_RMA};
    check("ucp_init", ucp_init(&params, config, &context));
    ucp_config_release(config);
    ucp_worker_params_t worker_params = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                         .thread_mode = UCS_THREAD_MODE_SINGLE};
    check("ucp_worker_create", ucp_worker_create(context, &worker_params, &worker));
}

static ucp_mem_h map(void *memory, size_t bytes) {
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        .address = memory,
        .length = bytes};
    ucp_mem_h mapped;
    check("ucp_mem_map", ucp_mem_map(context, &params, &mapped));
    return mapped;
}

static void print_hex(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        fprintf(answers, "%02x", ((const unsigned char *)data)[i]);
    }
}

static size_t parse_hex(const char *text, unsigned char *into) {
    size_t bytes = 0;
    unsigned value;
    while (bytes < BYTES_MAX && sscanf(text + 2 * bytes, "%2x", &value) == 1) {
        into[bytes++] = (unsigned char)value;
    }
    return bytes;
}

static void *end_with_stdin(void *unused) {
    (void)unused;
    char any[64];
    while (read(0, any, sizeof any) > 0) {
    }
    exit(0);
}

static void serve(const char *device, const char *segment, const char *path) {
    size_t bytes;
    const char *source = open_source(path, &bytes);
    char *memory = touched_memory(bytes);
    memcpy(memory, source, bytes);
    start(device, segment);
    void *key;
    size_t key_bytes, address_bytes;
    check("ucp_rkey_pack", ucp_rkey_pack(context, map(memory, bytes), &key, &key_bytes));
    ucp_address_t *address;
    check("address", ucp_worker_get_address(worker, &address, &address_bytes));
    fprintf(answers, "{\"hello\": \"%llx.", (unsigned long long)(uintptr_t)memory);
    print_hex(key, key_bytes);
    fprintf(answers, ".");
    print_hex(address, address_bytes);
    fprintf(answers, "\"}\n");
    fflush(answers);
    pthread_t thread;
    pthread_create(&thread, NULL, end_with_stdin, NULL);
    for (;;) {
        ucp_worker_progress(worker);
    }
}

static void on_end(void *unused, ucp_ep_h endpoint, ucs_status_t status) {
    (void)unused;
    (void)endpoint;
    fail("the server has gone", ucs_status_string(status));
}

static void read_batch(ucp_ep_h endpoint, ucp_rkey_h key, ucp_mem_h mapped, uint64_t from,
                       char *into, size_t size, size_t batch) {
    static void *requests[BATCH_MAX];
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH, .memh = mapped};
    for (size_t i = 0; i < batch; i++) {
        requests[i] = ucp_get_nbx(endpoint, into + i * size, size, from + i * size, key, &params);
        if (UCS_PTR_IS_ERR(requests[i])) {
            fail("ucp_get_nbx", ucs_status_string(UCS_PTR_STATUS(requests[i])));
        }
    }
    for (size_t i = 0; i < batch; i++) {
        if (requests[i] == NULL) {
            continue;
        }
        ucs_status_t status;
        while ((status = ucp_request_check_status(requests[i])) == UCS_INPROGRESS) {
            ucp_worker_progress(worker);
        }
        check("get", status);
        ucp_request_free(requests[i]);
    }
}

static int read_from(const char *hello, const char *device, const char *segment, const char *path,
                     size_t target_bytes) {
    static unsigned char key_data[BYTES_MAX], address[BYTES_MAX];
    size_t source_bytes;
    const char *expected = open_source(path, &source_bytes);
    char *target = touched_memory(target_bytes);
    char *rest;
    uint64_t base = strtoull(hello, &rest, 16);
    const char *second = *rest == '.' ? strchr(rest + 1, '.') : NULL;
    if (second == NULL) {
        fail("hello", "no greeting of a server");
    }
    parse_hex(rest + 1, key_data);
    parse_hex(second + 1, address);
    start(device, segment);
    ucp_mem_h mapped = map(target, target_bytes);
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = (const ucp_address_t *)address,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {.cb = on_end}};
    ucp_ep_h endpoint;
    check("ucp_ep_create", ucp_ep_create(worker, &params, &endpoint));
    ucp_rkey_h key;
    check("ucp_ep_rkey_unpack", ucp_ep_rkey_unpack(endpoint, key_data, &key));
    fprintf(answers, "{\"version\": \"UCX %s\"}\n", ucp_get_version_string());
    fflush(answers);
    unsigned long size, batch, calls, first;
    while (scanf("%lu %lu %lu %lu", &size, &batch, &calls, &first) == 4) {
        size_t bytes = size * batch;
        if (bytes == 0 || bytes > source_bytes || bytes > target_bytes || batch > BATCH_MAX ||
            calls > CALLS_MAX) {
            fprintf(answers, "{\"error\": \"larger than the memory\"}\n");
            fflush(answers);
            continue;
        }
        static double seconds[CALLS_MAX];
        int same = 1;
        for (unsigned long call = 0; call < calls; call++) {
            uint64_t offset = (first + call) % (source_bytes / bytes) * bytes;
            char *into = target + (first + call) % (target_bytes / bytes) * bytes;
            double begin = now();
            read_batch(endpoint, key, mapped, base + offset, into, size, batch);
            seconds[call] = now() - begin;
            same = call + 1 < calls || memcmp(into, expected + offset, bytes) == 0;
        }
        if (!same) {
            fprintf(answers, "{\"error\": \"what came is not what was sent\"}\n");
        } else {
            fprintf(answers, "{\"seconds\": [");
            for (unsigned long call = 0; call < calls; call++) {
                fprintf(answers, "%s%.9f", call == 0 ? "" : ", ", seconds[call]);
            }
            fprintf(answers, "]}\n");
        }
        fflush(answers);
    }
    _exit(0);
}

int main(int argc, char **argv) {
    answers = fdopen(dup(1), "w");
    dup2(2, 1);
    if (argc == 6 && strcmp(argv[1], "serve") == 0) {
        serve(argv[3], argv[4], argv[5]);
    }
    if (argc == 8 && strcmp(argv[1], "read") == 0) {
        return read_from(argv[3], argv[4], argv[5], argv[6], strtoul(argv[7], NULL, 10));
    }
    fprintf(stderr, "usage: raw_ucx serve|read ...: see raw_ucx.c\n");
    return 2;
}
