#include "python/bind.h"

namespace kvstore {

void BindPolicy(pybind11::module_ &) {}

}  // namespace kvstore
