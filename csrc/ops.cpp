// h2rec._C: the only C++ file that knows torch. It goes through the LibTorch stable ABI and the Python limited API, so
// that one binary serves torch >= 2.10 and CPython >= 3.10.
//
// The schemas of the operators are defined in h2rec/ops, so that everything traces without this binary; here kernels are
// registered for them (STABLE_TORCH_LIBRARY_IMPL). Only what has no meaning without the binary is defined here, as a
// fragment, because the namespace belongs to the Python side.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

static std::string cpu_capability() { return h2rec::name_of(h2rec::capability()); }

STABLE_TORCH_LIBRARY_FRAGMENT(h2rec, m) { m.def("cpu_capability() -> str"); }

// No tensor argument says which device is meant, hence the key that serves all.
STABLE_TORCH_LIBRARY_IMPL(h2rec, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

// Importing the module loads the binary, and loading it registers: there is nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
