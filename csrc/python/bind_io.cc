#include "python/bind.h"

namespace kvstore {

void BindIo(pybind11::module_ &) {}

}  // namespace kvstore
