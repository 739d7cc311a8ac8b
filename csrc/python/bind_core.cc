// Bindings of the store core and of the bare index: argument checks and conversion only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "copy/block_io.h"
#include "copy/scrub.h"
#include "copy/verify.h"
#include "core/index.h"
#include "core/store_core.h"
#include "python/bind.h"

namespace py = pybind11;

namespace kvstore {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// A row of kvstore.records.RECORD, the numpy dtype with the same packed fields.
#pragma pack(push, 1)
struct PackedRecord {
    std::uint32_t namespace_id;
    BlockHash hash;
    BlockHash parent;
    std::uint32_t depth;
    std::uint32_t segment;
    std::uint32_t page;
    std::uint32_t stored_bytes;
    std::uint8_t codec;
    std::uint64_t checksum;
    std::uint64_t stored_checksum;
};
struct PackedEvent {
    std::uint64_t sequence;
    std::uint8_t kind;
    std::uint8_t tier;
    std::uint32_t namespace_id;
    BlockHash hash;
    BlockHash parent;
    std::uint32_t depth;
};
#pragma pack(pop)

class Hashes {
public:
    explicit Hashes(const Array<std::uint8_t> &array) {
        if (array.ndim() != 2 || array.shape(1) != 32) {
            throw std::invalid_argument("hashes must have shape (n, 32) and dtype uint8");
        }
        data = reinterpret_cast<const BlockHash *>(array.data());
        n = static_cast<std::size_t>(array.shape(0));
    }
    const BlockHash *data;
    std::size_t n;
};

void CheckNamespace(const StoreCore &core, NamespaceId ns) {
    if (ns >= core.num_namespaces()) throw std::out_of_range("namespace_id is not registered");
}

void CheckTenant(const StoreCore &core, TenantId tenant) {
    if (tenant >= core.num_tenants()) throw std::out_of_range("tenant is not known");
}

template <typename T>
void CheckLength(const Array<T> &array, std::size_t n, const char *name) {
    if (array.ndim() != 1 || static_cast<std::size_t>(array.shape(0)) != n) {
        throw std::invalid_argument(std::string(name) + " must have one element for each block");
    }
}

const BlockHash *AsHash(const std::optional<py::bytes> &bytes, const char *name) {
    if (!bytes) return nullptr;
    if (PyBytes_GET_SIZE(bytes->ptr()) != 32) {
        throw std::invalid_argument(std::string(name) + " must be 32 bytes");
    }
    return reinterpret_cast<const BlockHash *>(PyBytes_AS_STRING(bytes->ptr()));
}

Chain AsChain(const Hashes &hashes, std::int64_t start, const std::optional<py::bytes> &parent) {
    const BlockHash *before = AsHash(parent, "parent");
    if (start > 0 && before == nullptr) {
        throw std::invalid_argument("parent is needed when start > 0");
    }
    return {hashes.data, hashes.n, start, before};
}

void CheckIds(const CopyPlan &plan, StoreCore &core, NamespaceId ns, const Array<std::int64_t> &ids,
              std::size_t n) {
    CheckLength(ids, n, "block_ids");
    if (plan.block_bytes != core.block_bytes(ns)) {
        throw std::invalid_argument("the buffers' blocks have " + std::to_string(plan.block_bytes) +
                                    " bytes, the namespace's " +
                                    std::to_string(core.block_bytes(ns)));
    }
    const Arena &arena = core.arena();
    if (TouchesEngine(plan, reinterpret_cast<std::uintptr_t>(arena.base()), arena.bytes())) {
        throw std::invalid_argument("the buffers overlap the store's arena");
    }
    const std::int64_t *data = ids.data();
    for (std::size_t i = 0; i < n; ++i) {
        if (data[i] < 0 || data[i] >= plan.num_blocks) {
            throw std::out_of_range("block id " + std::to_string(data[i]) + " is not in [0, " +
                                    std::to_string(plan.num_blocks) + ")");
        }
    }
}

void CheckDistinct(const Array<std::int64_t> &ids) {
    if (ids.size() < 2) return;
    std::vector<std::int64_t> sorted(ids.data(), ids.data() + ids.size());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
        throw std::invalid_argument("block id " + std::to_string(*twice) +
                                    " is a destination twice");
    }
}

template <typename T, typename Source, typename Field>
py::array Column(const std::vector<Source> &rows, std::size_t n, Field field) {
    py::array_t<T> column(static_cast<py::ssize_t>(n));
    T *out = column.mutable_data();
    for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<T>(field(rows[i]));
    return column;
}

template <typename Packed>
py::bytes AsBytes(const std::vector<Packed> &rows) {
    return py::bytes(reinterpret_cast<const char *>(rows.data()), rows.size() * sizeof(Packed));
}

std::vector<SsdRecord> AsRecords(const py::array &array, const StoreCore &core) {
    if (array.ndim() != 1 || array.itemsize() != sizeof(PackedRecord) ||
        !(array.flags() & py::array::c_style)) {
        throw std::invalid_argument("records must be a contiguous array of RECORD");
    }
    const auto *packed = static_cast<const PackedRecord *>(array.data());
    std::vector<SsdRecord> records(static_cast<std::size_t>(array.shape(0)));
    for (std::size_t i = 0; i < records.size(); ++i) {
        CheckNamespace(core, packed[i].namespace_id);
        records[i] = {packed[i].namespace_id,
                      packed[i].hash,
                      packed[i].parent,
                      packed[i].depth,
                      {packed[i].segment, packed[i].page, packed[i].stored_bytes, packed[i].codec,
                       packed[i].checksum, packed[i].stored_checksum}};
    }
    return records;
}

std::vector<PackedRecord> Pack(const std::vector<SsdRecord> &records) {
    std::vector<PackedRecord> packed;
    packed.reserve(records.size());
    for (const SsdRecord &r : records) {
        packed.push_back({r.namespace_id, r.hash, r.parent, r.depth, r.place.segment, r.place.page,
                          r.place.stored_bytes, r.place.codec, r.place.checksum,
                          r.place.stored_checksum});
    }
    return packed;
}

std::vector<SsdPlace> AsPlaces(const std::vector<SsdRecord> &records) {
    std::vector<SsdPlace> places;
    places.reserve(records.size());
    for (const SsdRecord &record : records) places.push_back(record.place);
    return places;
}

void CheckPolicy(const std::string &policy) {
    const auto names = EvictionPolicyNames();
    if (std::find(names.begin(), names.end(), policy) == names.end()) {
        throw std::invalid_argument("unknown eviction policy: " + policy);
    }
}

std::unique_ptr<StoreCore> AdoptCore(int fd, const std::string &policy) {
    CheckPolicy(policy);
    std::string error;
    std::unique_ptr<Arena> arena;
    {
        py::gil_scoped_release unlocked;
        arena = Arena::Adopt(fd, &error);
    }
    if (arena == nullptr) throw std::invalid_argument("fd: " + error);
    return std::make_unique<StoreCore>(std::move(arena), policy);
}

std::unique_ptr<StoreCore> MakeCore(std::size_t arena_bytes, std::size_t chunk_bytes,
                                    bool huge_pages, const std::string &policy) {
    if (chunk_bytes == 0 || chunk_bytes % kPageBytes != 0 || chunk_bytes > arena_bytes) {
        throw std::invalid_argument(
            "chunk_bytes must be a multiple of 4096 and at most arena_bytes");
    }
    CheckPolicy(policy);
    py::gil_scoped_release unlocked;
    std::string error;
    auto arena = Arena::Create(arena_bytes, chunk_bytes, huge_pages, &error);
    if (arena == nullptr)
        throw std::runtime_error("arena of " + std::to_string(arena_bytes) + " bytes: " + error);
    return std::make_unique<StoreCore>(std::move(arena), policy);
}

std::int64_t DeadlineNs(double seconds) {
    constexpr double kYear = 366.0 * 24 * 3600;
    return SteadyNowNs() + static_cast<std::int64_t>(std::clamp(seconds, 0.0, kYear) * 1e9);
}

py::tuple Reserve(StoreCore &core, OwnerId owner, NamespaceId ns,
                  const Array<std::uint8_t> &hash_array, std::int64_t start,
                  const std::optional<py::bytes> &parent, bool only_from_ssd) {
    CheckNamespace(core, ns);
    const Hashes hashes(hash_array);
    const Chain chain = AsChain(hashes, start, parent);
    std::vector<ReserveStatus> statuses(hashes.n);
    std::vector<Grant> grants(hashes.n);
    std::uint64_t reservation;
    {
        py::gil_scoped_release unlocked;
        reservation = core.Reserve(owner, ns, chain, only_from_ssd, statuses.data(), grants.data());
    }
    return py::make_tuple(
        reservation, Column<std::uint8_t>(statuses, hashes.n, [](ReserveStatus s) { return s; }),
        Column<std::uint64_t>(grants, hashes.n, [](const Grant &g) { return g.payload_offset; }));
}

bool Commit(StoreCore &core, OwnerId owner, std::uint64_t reservation,
            const std::optional<Array<std::uint64_t>> &checksums,
            const std::optional<Array<bool>> &ok) {
    const std::size_t n = core.ReservationSize(owner, reservation);
    if (n == 0) return false;
    if (checksums) CheckLength(*checksums, n, "checksums");
    if (ok) CheckLength(*ok, n, "ok");
    const std::uint64_t *sums = checksums ? checksums->data() : nullptr;
    const bool *flags = ok ? ok->data() : nullptr;
    py::gil_scoped_release unlocked;
    return core.Commit(owner, reservation, sums, flags, n);
}

py::tuple Acquire(StoreCore &core, OwnerId owner, NamespaceId ns,
                  const Array<std::uint8_t> &hash_array, std::optional<double> ttl_seconds,
                  bool use) {
    CheckNamespace(core, ns);
    const Hashes hashes(hash_array);
    std::vector<Grant> grants(hashes.n);
    const std::int64_t expires = ttl_seconds ? DeadlineNs(*ttl_seconds) : StoreCore::kNever;
    LeaseId lease = 0;
    std::size_t held;
    {
        py::gil_scoped_release unlocked;
        std::size_t damaged;
        held = AcquireVerified(core, owner, ns, hashes.data, hashes.n, expires, use, &lease,
                               grants.data(), &damaged);
    }
    return py::make_tuple(
        lease, Column<std::uint64_t>(grants, held, [](const Grant &g) { return g.payload_offset; }),
        Column<std::uint64_t>(grants, held, [](const Grant &g) { return g.header_offset; }),
        Column<std::uint64_t>(grants, held, [](const Grant &g) { return g.sequence; }),
        Column<std::uint64_t>(grants, held, [](const Grant &g) { return g.checksum; }));
}

py::tuple Put(StoreCore &core, OwnerId owner, NamespaceId ns, const Array<std::uint8_t> &hash_array,
              std::int64_t start, const std::optional<py::bytes> &parent, const CopyPlan &plan,
              const Array<std::int64_t> &ids, int threads) {
    CheckNamespace(core, ns);
    const Hashes hashes(hash_array);
    const Chain chain = AsChain(hashes, start, parent);
    CheckIds(plan, core, ns, ids, hashes.n);
    PutResult result;
    {
        py::gil_scoped_release unlocked;
        result = PutBlocks(core, owner, ns, chain, plan, ids.data(), threads);
    }
    return py::make_tuple(result.num_leading, result.num_stored, result.num_present,
                          result.num_pending, result.num_no_space, result.num_orphan);
}

py::tuple Load(StoreCore &core, OwnerId owner, NamespaceId ns,
               const Array<std::uint8_t> &hash_array, const CopyPlan &plan,
               const Array<std::int64_t> &ids, bool verify, int threads) {
    CheckNamespace(core, ns);
    const Hashes hashes(hash_array);
    CheckIds(plan, core, ns, ids, hashes.n);
    CheckDistinct(ids);
    LoadResult result;
    {
        py::gil_scoped_release unlocked;
        result =
            LoadBlocks(core, owner, ns, hashes.data, hashes.n, plan, ids.data(), verify, threads);
    }
    return py::make_tuple(result.num_loaded, result.corrupt);
}

py::dict StatsDict(const CoreStats &s) {
    using namespace py::literals;
    return py::dict(
        "blocks"_a = s.blocks, "cpu_blocks"_a = s.cpu_blocks, "ssd_blocks"_a = s.ssd_blocks,
        "cpu_used_bytes"_a = s.cpu_used_bytes, "cpu_capacity_bytes"_a = s.cpu_capacity_bytes,
        "index_bytes"_a = s.index_bytes, "leases"_a = s.leases, "reservations"_a = s.reservations,
        "committed"_a = s.committed, "evicted"_a = s.evicted,
        "refused_no_space"_a = s.refused_no_space, "refused_orphan"_a = s.refused_orphan,
        "leases_expired"_a = s.leases_expired, "quarantined"_a = s.quarantined,
        "unverified"_a = s.unverified, "damaged"_a = s.damaged);
}

py::dict TenantDict(const TenantStats &s) {
    using namespace py::literals;
    return py::dict("cpu_quota_bytes"_a = s.cpu_quota_bytes,
                    "ssd_quota_bytes"_a = s.ssd_quota_bytes, "cpu_used_bytes"_a = s.cpu_used_bytes,
                    "cpu_blocks"_a = s.cpu_blocks, "ssd_blocks"_a = s.ssd_blocks,
                    "ssd_used_bytes"_a = s.ssd_used_bytes, "evicted"_a = s.evicted,
                    "refused_no_space"_a = s.refused_no_space);
}

py::dict Recover(StoreCore &core, const std::unordered_map<NamespaceId, NamespaceId> &ids) {
    using namespace py::literals;
    if (!core.is_recovering()) throw std::invalid_argument("this store adopted no arena, or has");
    std::vector<NamespaceId> now;
    for (const auto &[before, number] : ids) {
        CheckNamespace(core, number);
        now.push_back(number);
    }
    std::sort(now.begin(), now.end());
    if (std::adjacent_find(now.begin(), now.end()) != now.end()) {
        throw std::invalid_argument("namespace_ids: two numbers become the same");
    }
    RecoverResult result;
    {
        py::gil_scoped_release unlocked;
        result = core.Recover(ids);
    }
    return py::dict("adopted"_a = result.adopted, "discarded"_a = result.discarded,
                    "quarantined"_a = result.quarantined, "bytes"_a = result.bytes);
}

// What survives the process, and tenants, apart from the rest for length.
void BindAdoption(py::class_<StoreCore> &core) {
    using namespace py::literals;
    core.def_static("adopt", &AdoptCore, "fd"_a, "policy"_a)
        .def_property_readonly("arena_id",
                               [](StoreCore &self) {
                                   const auto &id = self.arena().id();
                                   return py::bytes(reinterpret_cast<const char *>(id.data()),
                                                    id.size());
                               })
        .def("metadata", [](const StoreCore &self) { return py::bytes(self.Metadata()); })
        .def(
            "set_metadata",
            [](StoreCore &self, const py::bytes &data) {
                const std::string bytes = data;
                std::string error;
                py::gil_scoped_release unlocked;
                if (!self.SetMetadata(bytes, &error)) throw std::invalid_argument(error);
            },
            "data"_a)
        .def("recover", &Recover, "namespace_ids"_a)
        .def(
            "recovered_not_on_ssd",
            [](const StoreCore &self, NamespaceId ns) {
                CheckNamespace(self, ns);
                std::vector<BlockHash> hashes;
                {
                    py::gil_scoped_release unlocked;
                    hashes = self.ReadyNotOnSsd(ns);
                }
                return AsBytes(hashes);
            },
            "namespace_id"_a)
        .def("quarantine",
             [](const StoreCore &self) {
                 py::list rows;
                 for (const Quarantined &held : self.Quarantine()) {
                     rows.append(py::make_tuple(held.writer.id, held.writer.pid,
                                                held.writer.pid_start, held.num_slots));
                 }
                 return rows;
             })
        .def("release_quarantine", &StoreCore::ReleaseQuarantine, "writer_id"_a,
             py::call_guard<py::gil_scoped_release>())
        .def(
            "add_tenant",
            [](StoreCore &self, std::uint64_t cpu_quota, std::uint64_t ssd_quota) {
                return self.AddTenant(cpu_quota, ssd_quota);
            },
            "cpu_quota_bytes"_a, "ssd_quota_bytes"_a)
        .def(
            "tenant_stats",
            [](const StoreCore &self, TenantId tenant) {
                CheckTenant(self, tenant);
                return TenantDict(self.StatsOf(tenant));
            },
            "tenant"_a)
        .def(
            "scrub",
            [](StoreCore &self, std::uint64_t cursor, std::size_t max_bytes) {
                ScrubResult result;
                {
                    py::gil_scoped_release unlocked;
                    result = Scrub(self, cursor, max_bytes);
                }
                return py::make_tuple(result.cursor, result.bytes, result.num_damaged);
            },
            "cursor"_a, "max_bytes"_a)
        .def(
            "why",
            [](StoreCore &self, NamespaceId ns, const py::bytes &hash) {
                CheckNamespace(self, ns);
                return static_cast<int>(self.Why(ns, *AsHash(hash, "hash")));
            },
            "namespace_id"_a, "hash"_a)
        .def_property_readonly("change_count", &StoreCore::ChangeCount)
        .def(
            "wait_for_change",
            [](const StoreCore &self, std::uint64_t seen, double timeout_seconds) {
                const std::int64_t deadline = DeadlineNs(timeout_seconds);
                py::gil_scoped_release unlocked;
                return self.WaitForChange(seen, deadline);
            },
            "seen"_a, "timeout_seconds"_a);
}

// The methods of the ssd tier's side, apart from the rest for length.
void BindSsdSide(py::class_<StoreCore> &core) {
    using namespace py::literals;
    core.def(
            "set_ssd",
            [](StoreCore &self, const py::array &array) {
                const auto records = AsRecords(array, self);
                const auto places = AsPlaces(records);
                py::gil_scoped_release unlocked;
                for (std::size_t i = 0; i < records.size(); ++i) {
                    self.SetSsd(records[i].namespace_id, &records[i].hash, &places[i], 1);
                }
            },
            "records"_a)
        .def(
            "move_ssd",
            [](StoreCore &self, const py::array &from, const py::array &to) {
                const auto records = AsRecords(from, self);
                const auto moved = AsRecords(to, self);
                if (records.size() != moved.size()) {
                    throw std::invalid_argument("to must have one record for each of from");
                }
                const auto places = AsPlaces(moved);
                py::gil_scoped_release unlocked;
                self.MoveSsd(records.data(), places.data(), records.size());
            },
            "from_records"_a, "to_records"_a)
        .def(
            "describe",
            [](StoreCore &self, NamespaceId ns, const Array<std::uint8_t> &hash_array) {
                CheckNamespace(self, ns);
                const Hashes hashes(hash_array);
                std::vector<SsdRecord> records;
                {
                    py::gil_scoped_release unlocked;
                    records = self.Describe(ns, hashes.data, hashes.n);
                }
                return AsBytes(Pack(records));
            },
            "namespace_id"_a, "hashes"_a)
        .def(
            "ssd_gap",
            [](StoreCore &self, NamespaceId ns, const py::bytes &hash) {
                CheckNamespace(self, ns);
                const std::vector<BlockHash> gap = self.SsdGap(ns, *AsHash(hash, "hash"));
                return AsBytes(gap);
            },
            "namespace_id"_a, "hash"_a)
        .def(
            "drop_ssd",
            [](StoreCore &self, NamespaceId ns, const py::bytes &hash, std::uint32_t segment,
               std::uint32_t page) {
                CheckNamespace(self, ns);
                const BlockHash key = *AsHash(hash, "hash");
                py::gil_scoped_release unlocked;
                self.DropSsd(ns, key, segment, page);
            },
            "namespace_id"_a, "hash"_a, "segment"_a, "page"_a)
        .def(
            "survivors",
            [](StoreCore &self, const py::array &array) {
                const auto records = AsRecords(array, self);
                py::array_t<bool> keep(static_cast<py::ssize_t>(records.size()));
                bool *out = keep.mutable_data();
                {
                    py::gil_scoped_release unlocked;
                    self.Survivors(records.data(), records.size(), out);
                }
                return keep;
            },
            "records"_a)
        .def(
            "restore",
            [](StoreCore &self, const py::array &array) {
                const auto records = AsRecords(array, self);
                py::gil_scoped_release unlocked;
                return self.Restore(records.data(), records.size());
            },
            "records"_a)
        .def("take_garbage", [](StoreCore &self) { return AsBytes(Pack(self.TakeGarbage())); });
}

void BindIndex(py::module_ &m) {
    using namespace py::literals;
    py::class_<BlockIndex>(m, "BlockIndex",
                           "The bare index, for measuring it: available cpu blocks of one chain.")
        .def(py::init<>())
        .def(
            "insert_chain",
            [](BlockIndex &self, NamespaceId ns, const Array<std::uint8_t> &hash_array) {
                const Hashes hashes(hash_array);
                py::gil_scoped_release unlocked;
                EntryId parent = kNoEntry;
                for (std::size_t i = 0; i < hashes.n; ++i) {
                    EntryId id = self.Find(ns, hashes.data[i]);
                    if (id == kNoEntry) {
                        id = self.Insert(ns, hashes.data[i]);
                        if (parent != kNoEntry) self.LinkChild(parent, id);
                        Entry &entry = self[id];
                        entry.depth = static_cast<std::uint32_t>(i + 1);
                        entry.cpu = CpuState::kReady;
                        entry.rooted = true;
                    }
                    parent = id;
                }
            },
            "namespace_id"_a, "hashes"_a)
        .def(
            "remove_leaf",
            [](BlockIndex &self, NamespaceId ns, const py::bytes &hash) {
                const EntryId id = self.Find(ns, *AsHash(hash, "hash"));
                if (id == kNoEntry || self[id].first_child != kNoEntry) return false;
                self.UnlinkFromParent(id);
                self.Unmap(id);
                self.Free(id);
                return true;
            },
            "namespace_id"_a, "hash"_a)
        .def(
            "match",
            [](const BlockIndex &self, NamespaceId ns, const Array<std::uint8_t> &hash_array,
               std::int64_t start) {
                const Hashes hashes(hash_array);
                py::gil_scoped_release unlocked;
                return self.MatchPrefix(ns, hashes.data, hashes.n, start);
            },
            "namespace_id"_a, "hashes"_a, "start"_a)
        .def(
            "count",
            [](const BlockIndex &self, NamespaceId ns, const Array<std::uint8_t> &hash_array) {
                const Hashes hashes(hash_array);
                py::gil_scoped_release unlocked;
                std::vector<EntryId> found(hashes.n);
                self.FindMany(ns, hashes.data, hashes.n, found.data());
                return std::count_if(found.begin(), found.end(),
                                     [](EntryId id) { return id != kNoEntry; });
            },
            "namespace_id"_a, "hashes"_a)
        .def("__len__", &BlockIndex::size)
        .def_property_readonly("memory_bytes", &BlockIndex::memory_bytes);
}

}  // namespace

void BindCore(py::module_ &m) {
    using namespace py::literals;
    BindIndex(m);
    auto core = py::class_<StoreCore>(m, "StoreCore");
    core.def(py::init(&MakeCore), "arena_bytes"_a, "chunk_bytes"_a, "huge_pages"_a, "policy"_a)
        .def(
            "add_namespace",
            [](StoreCore &self, std::size_t block_bytes, TenantId tenant) {
                if (block_bytes == 0) throw std::invalid_argument("block_bytes must be positive");
                CheckTenant(self, tenant);
                NamespaceId ns;
                if (!self.AddNamespace(block_bytes, &ns, tenant)) {
                    throw std::invalid_argument("a block of " + std::to_string(block_bytes) +
                                                " bytes does not fit in a chunk of the arena");
                }
                return ns;
            },
            "block_bytes"_a, "tenant"_a = 0)
        .def(
            "block_bytes",
            [](const StoreCore &self, NamespaceId ns) {
                CheckNamespace(self, ns);
                return self.block_bytes(ns);
            },
            "namespace_id"_a)
        .def(
            "new_owner",
            [](StoreCore &self, std::uint64_t writer_id, std::uint32_t pid,
               std::uint64_t pid_start) {
                return self.NewOwner({.id = writer_id, .pid_start = pid_start, .pid = pid});
            },
            "writer_id"_a = 0, "pid"_a = 0, "pid_start"_a = 0)
        .def("release_owner", &StoreCore::ReleaseOwner, "owner"_a,
             py::call_guard<py::gil_scoped_release>())
        .def(
            "match",
            [](const StoreCore &self, NamespaceId ns, const Array<std::uint8_t> &hash_array,
               std::int64_t start) {
                CheckNamespace(self, ns);
                const Hashes hashes(hash_array);
                py::gil_scoped_release unlocked;
                return self.Match(ns, hashes.data, hashes.n, start);
            },
            "namespace_id"_a, "hashes"_a, "start"_a)
        .def(
            "residency",
            [](const StoreCore &self, NamespaceId ns, const Array<std::uint8_t> &hash_array) {
                CheckNamespace(self, ns);
                const Hashes hashes(hash_array);
                py::array_t<std::uint8_t> tiers(static_cast<py::ssize_t>(hashes.n));
                std::uint8_t *out = tiers.mutable_data();
                {
                    py::gil_scoped_release unlocked;
                    self.Residency(ns, hashes.data, hashes.n, out);
                }
                return tiers;
            },
            "namespace_id"_a, "hashes"_a)
        .def(
            "wait_for",
            [](const StoreCore &self, NamespaceId ns, const Array<std::uint8_t> &hash_array,
               std::int64_t start, std::size_t want, double timeout_seconds) {
                CheckNamespace(self, ns);
                const Hashes hashes(hash_array);
                const std::int64_t deadline = DeadlineNs(timeout_seconds);
                py::gil_scoped_release unlocked;
                return self.WaitFor(ns, hashes.data, hashes.n, start, std::min(want, hashes.n),
                                    deadline);
            },
            "namespace_id"_a, "hashes"_a, "start"_a, "want"_a, "timeout_seconds"_a)
        .def("reserve", &Reserve, "owner"_a, "namespace_id"_a, "hashes"_a, "start"_a, "parent"_a,
             "only_from_ssd"_a)
        .def("commit", &Commit, "owner"_a, "reservation"_a, "checksums"_a, "ok"_a)
        .def("abort", &StoreCore::Abort, "owner"_a, "reservation"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("acquire", &Acquire, "owner"_a, "namespace_id"_a, "hashes"_a, "ttl_seconds"_a, "use"_a)
        .def("release", &StoreCore::Release, "owner"_a, "lease"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("expire_leases", &StoreCore::ExpireLeases, py::call_guard<py::gil_scoped_release>())
        .def("put", &Put, "owner"_a, "namespace_id"_a, "hashes"_a, "start"_a, "parent"_a, "plan"_a,
             "block_ids"_a, "threads"_a)
        .def("load", &Load, "owner"_a, "namespace_id"_a, "hashes"_a, "plan"_a, "block_ids"_a,
             "verify"_a, "threads"_a)
        .def(
            "remove",
            [](StoreCore &self, NamespaceId ns, const Array<std::uint8_t> &hash_array) {
                CheckNamespace(self, ns);
                const Hashes hashes(hash_array);
                py::gil_scoped_release unlocked;
                return self.Remove(ns, hashes.data, hashes.n);
            },
            "namespace_id"_a, "hashes"_a)
        .def(
            "clear",
            [](StoreCore &self, NamespaceId ns) {
                CheckNamespace(self, ns);
                py::gil_scoped_release unlocked;
                self.Clear(ns);
            },
            "namespace_id"_a)
        .def("enable_events", &StoreCore::EnableEvents, "capacity"_a)
        .def(
            "event_sequence",
            [](const StoreCore &self, NamespaceId ns) {
                CheckNamespace(self, ns);
                return self.EventSequence(ns);
            },
            "namespace_id"_a)
        .def(
            "events_after",
            [](const StoreCore &self, NamespaceId ns, std::uint64_t after) {
                CheckNamespace(self, ns);
                std::vector<PackedEvent> packed;
                for (const Event &e : self.EventsAfter(ns, after)) {
                    packed.push_back({e.sequence, static_cast<std::uint8_t>(e.kind),
                                      static_cast<std::uint8_t>(e.tier), e.namespace_id, e.hash,
                                      e.parent, e.depth});
                }
                return AsBytes(packed);
            },
            "namespace_id"_a, "after"_a)
        .def("stats", [](const StoreCore &self) { return StatsDict(self.Stats()); })
        .def_property_readonly("arena_fd", [](StoreCore &self) { return self.arena().fd(); })
        .def_property_readonly("arena_bytes", [](StoreCore &self) { return self.arena().bytes(); })
        .def_property_readonly("arena", [](const py::object &self) {
            Arena &arena = self.cast<StoreCore &>().arena();
            return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(arena.bytes()), arena.base(),
                                             self);  // the view keeps the arena mapped
        });
    BindSsdSide(core);
    BindAdoption(core);
}

}  // namespace kvstore
