// h2rec._catalog: checks numpy arrays and hands their memory to the functions beside this file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "group_codes.h"

namespace py = pybind11;

static std::pair<py::array_t<std::int64_t>, py::array_t<std::int64_t>> group_codes(const py::array& codes) {
  if (!py::isinstance<py::array_t<std::int32_t>>(codes)) {
    throw py::value_error("codes must have dtype int32, got " + py::str(codes.dtype()).cast<std::string>());
  }
  if (codes.ndim() != 2 || codes.shape(1) == 0) {
    throw py::value_error("codes must have shape [num_items, num_levels] with at least one level, got " +
                          py::str(codes.attr("shape")).cast<std::string>());
  }
  if (!(codes.flags() & py::array::c_style)) {
    throw py::value_error("codes must be C-contiguous");
  }
  const auto* data = static_cast<const std::int32_t*>(codes.data());
  const std::int64_t num_items = codes.shape(0), num_levels = codes.shape(1);
  py::array_t<std::int64_t> order(num_items);
  std::int64_t* order_data = order.mutable_data();
  std::vector<std::int64_t> starts;
  {
    py::gil_scoped_release release;
    starts = h2rec::catalog::group_codes(data, num_items, num_levels, order_data);
  }
  return {order, py::array_t<std::int64_t>(starts.size(), starts.data())};
}

PYBIND11_MODULE(_catalog, m) {
  m.doc() = "Work on whole catalogs: numpy arrays in and out, without torch.";
  m.def("group_codes", &group_codes, py::arg("codes"),
        "group_codes(codes) -> (order, starts)\n\n"
        "codes: int32 [num_items, num_levels], C-contiguous, not negative.\n"
        "order: int64 [num_items], item ids sorted by their row of codes; equal rows by item id.\n"
        "starts: int64 [num_groups + 1]; group g of items with equal codes is order[starts[g]:starts[g + 1]].");
}
