// Eviction policies alone, for tests, and the simulator, for `bench/eviction.py`.
//
// The GIL is kept throughout: neither class locks, and each call takes microseconds.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/eviction.h"
#include "core/policy_simulator.h"
#include "python/bind.h"

namespace py = pybind11;

namespace kvstore {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::unique_ptr<EvictionPolicy> PolicyNamed(const std::string &name, std::int64_t num_slots,
                                            const char *argument) {
    if (num_slots <= 0 || num_slots >= std::int64_t{1} << 31) {
        throw py::value_error(std::string(argument) + ": must be from 1 to 2^31 - 1, not " +
                              std::to_string(num_slots));
    }
    std::unique_ptr<EvictionPolicy> policy =
        MakeEvictionPolicy(name, static_cast<SlotId>(num_slots));
    if (policy == nullptr) {
        std::string names;
        for (const std::string &known : EvictionPolicyNames()) {
            names += (names.empty() ? "" : ", ") + known;
        }
        throw py::value_error("name: no eviction policy '" + name + "'; there are " + names);
    }
    return policy;
}

// A policy plus the checks that its owner would make.
class CheckedPolicy {
public:
    CheckedPolicy(const std::string &name, std::int64_t num_slots)
        : policy_(PolicyNamed(name, num_slots, "num_slots")),
          known_(static_cast<std::size_t>(num_slots)) {}

    void Add(std::int64_t slot, std::uint64_t key) {
        const SlotId id = Slot(slot);
        if (known_[id]) {
            throw py::value_error("slot: " + std::to_string(slot) + " was added before");
        }
        policy_->Add(id, key);
        known_[id] = true;
    }

    void Touch(std::int64_t slot) { policy_->Touch(Slot(slot)); }

    void TouchAll(const Array<SlotId> &slots) {
        CheckIdle();
        const auto ids = slots.unchecked<1>();
        for (py::ssize_t i = 0; i < ids.shape(0); ++i) Slot(ids(i));
        for (py::ssize_t i = 0; i < ids.shape(0); ++i) policy_->Touch(ids(i));
    }

    void Remove(std::int64_t slot) {
        const SlotId id = Slot(slot);
        policy_->Remove(id);
        known_[id] = false;
    }

    void Due(std::int64_t slot) { policy_->Due(Slot(slot)); }

    std::optional<SlotId> PopVictim(const py::object &evictable) {
        CheckIdle();
        if (py::isinstance<Array<bool>>(evictable)) {
            const auto flags = py::cast<Array<bool>>(evictable);
            if (flags.ndim() != 1 || static_cast<std::size_t>(flags.size()) != known_.size()) {
                throw py::value_error("evictable: an array must have one flag for each slot");
            }
            const bool *data = flags.data();
            return Pop([data](SlotId slot) { return data[slot]; });
        }
        if (PyCallable_Check(evictable.ptr()) == 0) {
            throw py::type_error("evictable: must be an array of bool or a callable");
        }
        // An exception must not pass through the policy. From then on no slot may leave; those
        // asked about, that one included, are parked.
        std::exception_ptr error;
        const std::optional<SlotId> victim = Pop([&](SlotId slot) {
            if (error) return false;
            try {
                return py::cast<bool>(evictable(slot));
            } catch (...) {
                error = std::current_exception();
                return false;
            }
        });
        if (error) std::rethrow_exception(error);
        return victim;
    }

    std::size_t size() const { return policy_->size(); }

private:
    void CheckIdle() const {
        if (popping_) throw std::runtime_error("the policy is used from within evictable()");
    }

    SlotId Slot(std::int64_t slot) const {
        CheckIdle();
        if (slot < 0 || static_cast<std::size_t>(slot) >= known_.size()) {
            throw py::value_error("slot: " + std::to_string(slot) + " is not from 0 to " +
                                  std::to_string(known_.size() - 1));
        }
        return static_cast<SlotId>(slot);
    }

    std::optional<SlotId> Pop(const EvictionPolicy::Evictable &evictable) {
        popping_ = true;
        const SlotId victim = policy_->PopVictim(evictable);
        popping_ = false;
        if (victim == kNoSlot) return std::nullopt;
        known_[victim] = false;
        return victim;
    }

    std::unique_ptr<EvictionPolicy> policy_;
    std::vector<bool> known_;
    bool popping_ = false;
};

std::size_t Request(PolicySimulator &simulator, const Array<std::uint64_t> &ids) {
    if (ids.ndim() != 1) throw py::value_error("ids: must have one dimension");
    const auto count = static_cast<std::size_t>(ids.size());
    if (!simulator.IsChain(ids.data(), count)) {
        throw py::value_error(
            "ids: not the prefixes of one request (an id occurs twice or follows"
            " another id than before)");
    }
    return simulator.Request(ids.data(), count);
}

}  // namespace

void BindPolicy(py::module_ &m) {
    m.def("eviction_policy_names", &EvictionPolicyNames, "Sorted names of all eviction policies.");

    py::class_<CheckedPolicy>(m, "EvictionPolicy", "One eviction policy alone; see eviction.h.")
        .def(py::init<const std::string &, std::int64_t>(), py::arg("name"), py::arg("num_slots"))
        .def("add", &CheckedPolicy::Add, py::arg("slot"), py::arg("key"))
        .def("touch", &CheckedPolicy::Touch, py::arg("slot"))
        .def("touch_all", &CheckedPolicy::TouchAll, py::arg("slots").noconvert())
        .def("remove", &CheckedPolicy::Remove, py::arg("slot"))
        .def("due", &CheckedPolicy::Due, py::arg("slot"))
        .def("pop_victim", &CheckedPolicy::PopVictim, py::arg("evictable"))
        .def_property_readonly("size", &CheckedPolicy::size);

    py::class_<PolicySimulator>(m, "PolicySimulator",
                                "Replays requests through a policy; see policy_simulator.h.")
        .def(py::init([](const std::string &name, std::int64_t capacity_blocks) {
                 auto policy = PolicyNamed(name, capacity_blocks, "capacity_blocks");
                 return std::make_unique<PolicySimulator>(std::move(policy),
                                                          static_cast<SlotId>(capacity_blocks));
             }),
             py::arg("name"), py::arg("capacity_blocks"))
        .def("request", &Request, py::arg("ids").noconvert(),
             "Returns how many leading blocks were resident.")
        .def_property_readonly("resident", &PolicySimulator::resident)
        .def_property_readonly("evictions", &PolicySimulator::evictions)
        .def_property_readonly("checks", &PolicySimulator::checks);
}

}  // namespace kvstore
