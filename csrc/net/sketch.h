// The most used prefixes, in constant memory: the Space-Saving sketch (Metwally, Agrawal, El
// Abbadi 2005). A prefix that makes up more than 1/kPlaces of all uses is among its entries; counts
// are too high by at most the smallest one.
//
// Thread safety: none; the caller locks.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/types.h"

namespace kvstore {

struct HotPrefix {
    NamespaceId namespace_id = 0;
    BlockHash first{};
    std::uint64_t uses = 0;
    std::uint64_t blocks = 0;  // the longest use
};

class PrefixSketch {
public:
    static constexpr std::size_t kPlaces = 64;

    void Add(NamespaceId ns, const BlockHash &first, std::uint64_t blocks) {
        const std::uint64_t key = first.Prefix64() ^ ns;
        std::size_t least = 0;
        for (std::size_t i = 0; i < used_; ++i) {
            if (keys_[i] == key && places_[i].namespace_id == ns && places_[i].first == first) {
                ++places_[i].uses;
                places_[i].blocks = std::max(places_[i].blocks, blocks);
                return;
            }
            if (places_[i].uses < places_[least].uses) least = i;
        }
        const std::uint64_t inherited = used_ < kPlaces ? 0 : places_[least].uses;
        const std::size_t place = used_ < kPlaces ? used_++ : least;
        keys_[place] = key;
        places_[place] = {ns, first, inherited + 1, blocks};
    }
    // Most used first.
    std::vector<HotPrefix> Top() const {
        std::vector<HotPrefix> top(places_.begin(),
                                   places_.begin() + static_cast<std::ptrdiff_t>(used_));
        std::sort(top.begin(), top.end(),
                  [](const HotPrefix &a, const HotPrefix &b) { return a.uses > b.uses; });
        return top;
    }

private:
    std::array<std::uint64_t, kPlaces> keys_{};
    std::array<HotPrefix, kPlaces> places_{};
    std::size_t used_ = 0;
};

}  // namespace kvstore
