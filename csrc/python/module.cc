// The extension module. Bindings check arguments and convert types; no logic lives in csrc/python.
#include "python/bind.h"

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native data path of kvstore.";
    kvstore::BindHash(m);
    kvstore::BindCopy(m);
    kvstore::BindQuant(m);
    kvstore::BindIo(m);
    kvstore::BindPolicy(m);
    kvstore::BindCore(m);
    kvstore::BindNet(m);
    kvstore::BindUcx(m);
    kvstore::BindMove(m);
    kvstore::BindBulk(m);
}
