#include "python/bind.h"

namespace kvstore {

void BindHash(pybind11::module_ &) {}

}  // namespace kvstore
