#include "core/eviction.h"

#include <map>

#include "core/check.h"

namespace kvstore {
namespace {

// Made on first use, because policies register themselves while the library loads, in an order
// that the linker chooses.
std::map<std::string, RegisterPolicy::Factory> &Registry() {
    static std::map<std::string, RegisterPolicy::Factory> registry;
    return registry;
}

}  // namespace

RegisterPolicy::RegisterPolicy(const char *name, Factory factory) {
    KV_CHECK(Registry().emplace(name, factory).second);
}

std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(const std::string &name, SlotId num_slots) {
    const auto found = Registry().find(name);
    return found == Registry().end() ? nullptr : found->second(num_slots);
}

std::vector<std::string> EvictionPolicyNames() {
    std::vector<std::string> names;
    for (const auto &entry : Registry()) names.push_back(entry.first);
    return names;
}

}  // namespace kvstore
