#include "python/bind.h"

namespace kvstore {

void BindCore(pybind11::module_ &) {}

}  // namespace kvstore
