#include "python/bind.h"

namespace kvstore {

void BindCopy(pybind11::module_ &) {}

}  // namespace kvstore
