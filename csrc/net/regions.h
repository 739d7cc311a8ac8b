// Registered memory of this process, which peers read and write by its id.
//
// A region that is being removed is refused from then on; who uses it at that time is waited for,
// and cut off when that takes too long. Memory may be freed or reused when Remove returned true.
//
// Thread safety: one mutex guards everything; all methods may be called from any thread.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvstore {

class Regions {
public:
    // Who moves bytes of a region, in some thread.
    class User {
    public:
        // Makes the move end at once. Called from another thread, with the mutex held.
        virtual void Cut() = 0;

    protected:
        ~User() = default;
    };

    // What was found, for as long as this lives.
    class Use {
    public:
        Use() = default;
        Use(Use &&other) noexcept { *this = std::move(other); }
        Use &operator=(Use &&other) noexcept {
            std::swap(regions_, other.regions_);
            std::swap(id_, other.id_);
            std::swap(user_, other.user_);
            std::swap(base_, other.base_);
            std::swap(bytes_, other.bytes_);
            return *this;
        }
        ~Use();

        explicit operator bool() const { return regions_ != nullptr; }
        // Null when those bytes are not all within the region.
        std::uint8_t *At(std::uint64_t offset, std::uint64_t bytes) const {
            return offset <= bytes_ && bytes <= bytes_ - offset ? base_ + offset : nullptr;
        }

    private:
        friend class Regions;
        Regions *regions_ = nullptr;
        std::uint64_t id_ = 0;
        User *user_ = nullptr;
        std::uint8_t *base_ = nullptr;
        std::uint64_t bytes_ = 0;
    };

    // False when a region has that id, also one that is still in use after its removal.
    // REQUIRES: the memory stays readable (and writable) until Remove returned true.
    bool Add(std::uint64_t id, std::uint8_t *base, std::uint64_t bytes, bool writable);
    // False when it is still in use at the deadline. Users are cut off shortly before it.
    bool Remove(std::uint64_t id, std::int64_t deadline_ns);
    // An empty Use when there is no such region, or it may not be written to.
    Use Find(std::uint64_t id, bool for_writing, User *user);
    std::size_t size() const;

private:
    struct Region {
        std::uint8_t *base = nullptr;
        std::uint64_t bytes = 0;
        bool writable = false;
        bool removed = false;
        std::vector<User *> users;
    };
    void End(std::uint64_t id, User *user);

    mutable std::mutex mutex_;
    std::condition_variable ended_;
    std::unordered_map<std::uint64_t, Region> regions_;
};

}  // namespace kvstore
