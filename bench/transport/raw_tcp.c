// How fast can one process read another's memory over TCP? The measure for kvstore's framed TCP:
// nothing but sockets. No frames, no checksums, no authentication, contiguous memory.
//
//   raw_tcp serve ADDRESS CONNECTIONS SOURCE_FILE              prints {"hello": "PORT"}
//   raw_tcp read ADDRESS PORT CONNECTIONS SOURCE_FILE TARGET_BYTES     prints {"version": ...}
//
// The reader then takes lines "SIZE BATCH CALLS FIRST" on stdin: read CALLS batches of BATCH blocks
// of SIZE bytes, the first of them the FIRST batch of the source, each into the next place of the
// target, both walked in circles. It answers {"seconds": [...]}, a number a batch, or {"error":
// ...} when what came is not what the source holds (which is compared outside the times). Both end
// with their stdin.
//
// As measured best: the sender hands 256 KiB to the kernel at a time (more falls out of the cache
// between the two copies), the receiver spins for a while before it sleeps (a wake-up costs 20-85
// us), each connection has a thread on either side and carries an equal part of the batch.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 256 << 10, CONNECTIONS_MAX = 16 };

static int
    spins_max;  // before a sleep; 0 where threads that spin would take each other's processor

struct request {
    uint64_t offset;
    uint64_t bytes;
};

static void fail(const char *what) {
    fprintf(stderr, "raw_tcp: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Spins, then sleeps: 0 at the end of the stream.
static size_t receive_some(int fd, void *into, size_t bytes) {
    for (int spins = 0;;) {
        ssize_t got = recv(fd, into, bytes, MSG_DONTWAIT);
        if (got >= 0) {
            return (size_t)got;
        }
        if (errno != EAGAIN && errno != EINTR) {
            fail("recv");
        }
        if (++spins > spins_max) {
            struct pollfd wait = {.fd = fd, .events = POLLIN};
            poll(&wait, 1, -1);
            spins = 0;
        }
    }
}

static int receive_all(int fd, void *into, size_t bytes) {
    for (size_t at = 0; at < bytes;) {
        size_t got = receive_some(fd, (char *)into + at, bytes - at);
        if (got == 0) {
            return 0;
        }
        at += got;
    }
    return 1;
}

static void send_all(int fd, const void *from, size_t bytes) {
    for (size_t at = 0; at < bytes;) {
        size_t part = bytes - at < CHUNK ? bytes - at : CHUNK;
        ssize_t sent = send(fd, (const char *)from + at, part, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            exit(0);  // the reader has gone
        }
        at += (size_t)sent;
    }
}

static void tune(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static char *touched_memory(size_t bytes) {
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail("mmap");
    }
    memset(memory, 1, bytes);
    return memory;
}

// The file's bytes; mapped, or in memory of our own.
static char *open_source(const char *path, size_t *bytes, int own) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        fail(path);
    }
    *bytes = (size_t)status.st_size;
    char *mapped = mmap(NULL, *bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        fail(path);
    }
    if (!own) {
        return mapped;
    }
    char *copy = touched_memory(*bytes);
    memcpy(copy, mapped, *bytes);
    munmap(mapped, *bytes);
    return copy;
}

// ---- the side that is read

struct serving {
    int fd;
    const char *source;
    size_t source_bytes;
};

static void *serve_one(void *argument) {
    struct serving *serving = argument;
    struct request request;
    while (receive_all(serving->fd, &request, sizeof request)) {
        if (request.offset > serving->source_bytes ||
            request.bytes > serving->source_bytes - request.offset) {
            exit(1);
        }
        send_all(serving->fd, serving->source + request.offset, request.bytes);
    }
    return NULL;
}

static void *end_with_stdin(void *unused) {
    (void)unused;
    char any[64];
    while (read(0, any, sizeof any) > 0) {
    }
    exit(0);
}

static int serve(const char *address, int connections, const char *path) {
    static struct serving all[CONNECTIONS_MAX];
    size_t bytes = 0;
    char *source = open_source(path, &bytes, 1);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t length = sizeof at;
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1 ||
        bind(listener, (struct sockaddr *)&at, sizeof at) != 0 ||
        listen(listener, CONNECTIONS_MAX) != 0 ||
        getsockname(listener, (struct sockaddr *)&at, &length) != 0) {
        fail(address);
    }
    printf("{\"hello\": \"%d\"}\n", ntohs(at.sin_port));
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, end_with_stdin, NULL);
    for (int i = 0; i < connections; i++) {
        all[i] = (struct serving){accept(listener, NULL, NULL), source, bytes};
        if (all[i].fd < 0) {
            fail("accept");
        }
        tune(all[i].fd);
        pthread_create(&thread, NULL, serve_one, &all[i]);
    }
    pthread_join(thread, NULL);  // the last connection's
    return 0;
}

// ---- the side that reads

struct part {
    int fd;
    struct request request;
    char *into;
    atomic_int go;    // counts batches to do
    atomic_int done;  // counts batches done
};

static void read_part(struct part *part) {
    send_all(part->fd, &part->request, sizeof part->request);
    if (!receive_all(part->fd, part->into, part->request.bytes)) {
        fprintf(stderr, "raw_tcp: the server has gone\n");
        exit(1);
    }
}

static void *read_parts(void *argument) {
    struct part *part = argument;
    for (int number = 1;; number++) {
        for (int spins = 0; atomic_load(&part->go) < number; spins++) {
            if (spins > spins_max) {
                usleep(100);
            }
        }
        read_part(part);
        atomic_store(&part->done, number);
    }
    return NULL;
}

static void read_batch(struct part *parts, int connections, uint64_t offset, char *into,
                       size_t bytes) {
    size_t share = bytes / (size_t)connections;
    for (int i = 0; i < connections && i < CONNECTIONS_MAX; i++) {
        size_t begin = share * (size_t)i;
        size_t end = i == connections - 1 ? bytes : begin + share;
        parts[i].request = (struct request){offset + begin, end - begin};
        parts[i].into = into + begin;
        if (i > 0) {
            atomic_fetch_add(&parts[i].go, 1);
        }
    }
    read_part(&parts[0]);
    for (int i = 1; i < connections; i++) {
        while (atomic_load(&parts[i].done) < atomic_load(&parts[i].go)) {
        }
    }
}

static int read_from(const char *address, int port, int connections, const char *path,
                     size_t target_bytes) {
    static struct part parts[CONNECTIONS_MAX];
    size_t source_bytes = 0;
    const char *expected = open_source(path, &source_bytes, 0);
    char *target = touched_memory(target_bytes);
    for (int i = 0; i < connections; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
        parts[i].fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
            connect(parts[i].fd, (struct sockaddr *)&to, sizeof to) != 0) {
            fail(address);
        }
        tune(parts[i].fd);
        pthread_t thread;
        if (i > 0) {
            pthread_create(&thread, NULL, read_parts, &parts[i]);
        }
    }
    printf("{\"version\": \"%d connection%s\"}\n", connections, connections == 1 ? "" : "s");
    fflush(stdout);
    unsigned long size, batch, calls, first;
    while (scanf("%lu %lu %lu %lu", &size, &batch, &calls, &first) == 4) {
        size_t bytes = size * batch;
        if (bytes == 0 || bytes > source_bytes || bytes > target_bytes) {
            printf("{\"error\": \"a batch larger than the memory\"}\n");
            fflush(stdout);
            continue;
        }
        double seconds[4096];
        calls = calls < 4096 ? calls : 4096;
        int same = 1;
        for (unsigned long call = 0; call < calls; call++) {
            uint64_t offset = (first + call) % (source_bytes / bytes) * bytes;
            char *into = target + (first + call) % (target_bytes / bytes) * bytes;
            double begin = now();
            read_batch(parts, connections, offset, into, bytes);
            seconds[call] = now() - begin;
            same = call + 1 < calls || memcmp(into, expected + offset, bytes) == 0;
        }
        if (!same) {
            printf("{\"error\": \"what came is not what was sent\"}\n");
        } else {
            printf("{\"seconds\": [");
            for (unsigned long call = 0; call < calls; call++) {
                printf("%s%.9f", call == 0 ? "" : ", ", seconds[call]);
            }
            printf("]}\n");
        }
        fflush(stdout);
    }
    return 0;
}

static int count(const char *text) {
    int connections = atoi(text);
    if (connections < 1 || connections > CONNECTIONS_MAX) {
        fprintf(stderr, "raw_tcp: 1 to %d connections\n", CONNECTIONS_MAX);
        exit(2);
    }
    spins_max = sysconf(_SC_NPROCESSORS_ONLN) >= 2 * connections ? 20000 : 0;
    return connections;
}

int main(int argc, char **argv) {
    if (argc == 5 && strcmp(argv[1], "serve") == 0) {
        return serve(argv[2], count(argv[3]), argv[4]);
    }
    if (argc == 7 && strcmp(argv[1], "read") == 0) {
        return read_from(argv[2], atoi(argv[3]), count(argv[4]), argv[5],
                         strtoul(argv[6], NULL, 10));
    }
    fprintf(stderr, "usage: raw_tcp serve|read ...: see raw_tcp.c\n");
    return 2;
}
