#include "copy/verify.h"

#include <algorithm>

#include "copy/copy.h"

namespace kvstore {

std::size_t AcquireVerified(StoreCore &core, OwnerId owner, NamespaceId ns, const BlockHash *hashes,
                            std::size_t n, std::int64_t expires_ns, bool use, LeaseId *lease,
                            Grant *grants, std::size_t *num_damaged) {
    *num_damaged = 0;
    for (;;) {
        const std::size_t held = core.Acquire(owner, ns, hashes, n, expires_ns, use, lease, grants);
        const Grant *first = std::find_if(grants, grants + held,
                                          [](const Grant &grant) { return grant.unverified; });
        if (first == grants + held) return held;
        const std::size_t block_bytes = core.block_bytes(ns);
        std::size_t sound = static_cast<std::size_t>(first - grants);
        for (; sound < held; ++sound) {
            Grant &grant = grants[sound];
            if (!grant.unverified) continue;
            const std::uint8_t *payload = core.arena().base() + grant.payload_offset;
            if (Xxh3(payload, block_bytes) != grant.checksum) break;
            core.MarkVerified(ns, &hashes[sound], &grant.sequence, 1);
            grant.unverified = false;
        }
        if (sound == held) return held;
        // What follows the damaged block goes with it, so the lease is taken anew without it.
        core.Release(owner, *lease);
        *num_damaged += core.RemoveDamaged(ns, hashes[sound], grants[sound].sequence);
        n = sound;
    }
}

}  // namespace kvstore
