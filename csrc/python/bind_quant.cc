#include "python/bind.h"

namespace kvstore {

void BindQuant(pybind11::module_ &) {}

}  // namespace kvstore
