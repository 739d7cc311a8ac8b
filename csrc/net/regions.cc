#include "net/regions.h"

#include <algorithm>
#include <chrono>

#include "core/check.h"
#include "core/store_core.h"

namespace kvstore {

namespace {

// Of the time to a deadline, what those who were cut off have to notice it.
constexpr std::int64_t kCutNs = 250'000'000;

std::chrono::steady_clock::time_point AsTime(std::int64_t ns) {
    return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}

}  // namespace

Regions::Use::~Use() {
    if (regions_ != nullptr) regions_->End(id_, user_);
}

bool Regions::Add(std::uint64_t id, std::uint8_t *base, std::uint64_t bytes, bool writable) {
    const std::lock_guard lock(mutex_);
    return regions_.try_emplace(id, Region{base, bytes, writable, false, {}}).second;
}

bool Regions::Remove(std::uint64_t id, std::int64_t deadline_ns) {
    std::unique_lock lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) return true;
    found->second.removed = true;
    if (found->second.users.empty()) {
        regions_.erase(found);
        return true;
    }
    // Gone with its last user; another of that id may have come since.
    const auto gone = [&] {
        const auto now = regions_.find(id);
        return now == regions_.end() || !now->second.removed;
    };
    const std::int64_t left = std::max<std::int64_t>(deadline_ns - SteadyNowNs(), 0);
    if (ended_.wait_until(lock, AsTime(deadline_ns - std::min(left / 2, kCutNs)), gone))
        return true;
    for (User *user : regions_.at(id).users) user->Cut();
    return ended_.wait_until(lock, AsTime(deadline_ns), gone);
}

Regions::Use Regions::Find(std::uint64_t id, bool for_writing, User *user) {
    Use use;
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) return use;
    Region &region = found->second;
    if (region.removed || (for_writing && !region.writable)) return use;
    region.users.push_back(user);
    use.regions_ = this;
    use.id_ = id;
    use.user_ = user;
    use.base_ = region.base;
    use.bytes_ = region.bytes;
    return use;
}

std::size_t Regions::size() const {
    const std::lock_guard lock(mutex_);
    return regions_.size();
}

void Regions::End(std::uint64_t id, User *user) {
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(id);
    KV_CHECK(found != regions_.end());
    std::vector<User *> &users = found->second.users;
    const auto place = std::find(users.begin(), users.end(), user);
    KV_CHECK(place != users.end());
    users.erase(place);
    if (!users.empty() || !found->second.removed) return;
    regions_.erase(found);
    ended_.notify_all();
}

}  // namespace kvstore
