// One function per part of the core; module.cc calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace kvstore {

void BindHash(pybind11::module_ &m);
void BindCore(pybind11::module_ &m);
void BindCopy(pybind11::module_ &m);
void BindQuant(pybind11::module_ &m);
void BindIo(pybind11::module_ &m);
void BindPolicy(pybind11::module_ &m);
void BindNet(pybind11::module_ &m);
void BindUcx(pybind11::module_ &m);
void BindMove(pybind11::module_ &m);
void BindBulk(pybind11::module_ &m);

}  // namespace kvstore
