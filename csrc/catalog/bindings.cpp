// h2rec._catalog: checks numpy arrays and hands their memory to the functions beside this file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "co_occurrence.h"
#include "group_codes.h"
#include "place_items.h"

namespace py = pybind11;

// The elements of a C-contiguous array of this type and shape; -1 stands for any size.
template <typename T>
static const T* elements(const char* name, const py::array& array, std::initializer_list<std::int64_t> shape) {
  bool fits = py::isinstance<py::array_t<T>>(array) && (array.flags() & py::array::c_style) &&
              array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
    fits = shape.begin()[axis] < 0 || array.shape(axis) == shape.begin()[axis];
  }
  if (!fits) {
    const auto text = [](const py::handle& value) { return py::str(value).cast<std::string>(); };
    throw py::value_error(std::string(name) + " must be C-contiguous, " + text(py::dtype::of<T>()) +
                          " and of a length that fits the others, got " + text(array.dtype()) + " " +
                          text(array.attr("shape")));
  }
  return static_cast<const T*>(array.data());
}

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

static py::array_t<std::int32_t> place_items(const py::array& prefixes, const py::array& candidates,
                                             const py::array& settled_prefixes, const py::array& settled_codes,
                                             std::int64_t num_codes, std::int64_t capacity) {
  if (prefixes.ndim() != 1 || settled_prefixes.ndim() != 1 || candidates.ndim() != 2 || candidates.shape(1) == 0) {
    throw py::value_error("prefixes must have one dimension, candidates two with at least one column");
  }
  const std::int64_t num_items = prefixes.shape(0), num_settled = settled_prefixes.shape(0);
  const h2rec::catalog::Wishes wishes{elements<std::int64_t>("prefixes", prefixes, {num_items}),
                                      elements<std::int32_t>("candidates", candidates, {num_items, -1}), num_items,
                                      candidates.shape(1)};
  const h2rec::catalog::Settled settled{elements<std::int64_t>("settled_prefixes", settled_prefixes, {num_settled}),
                                        elements<std::int32_t>("settled_codes", settled_codes, {num_settled}),
                                        num_settled};
  std::vector<std::int32_t> choices;
  {
    py::gil_scoped_release release;
    choices = h2rec::catalog::place_items(wishes, settled, num_codes, capacity);
  }
  return py::array_t<std::int32_t>(choices.size(), choices.data());
}

static py::tuple co_occurrence(const py::array& items, const py::array& offsets, std::int64_t num_items,
                               std::int64_t window, std::int64_t min_count, std::int64_t max_per_item, bool is_ppmi,
                               double discount) {
  const auto* starts = elements<std::int64_t>("offsets", offsets, {-1});
  if (offsets.shape(0) == 0 || items.ndim() != 1 || starts[offsets.shape(0) - 1] != items.shape(0)) {
    throw py::value_error("offsets must end with the number of items");
  }
  const h2rec::catalog::Sequences sequences{elements<std::int64_t>("items", items, {-1}), starts, offsets.shape(0) - 1,
                                            num_items};
  h2rec::catalog::Neighbours found;
  {
    py::gil_scoped_release release;
    found = h2rec::catalog::co_occurrence(sequences, {window, min_count, max_per_item, is_ppmi, discount});
  }
  return py::make_tuple(py::array_t<std::int64_t>(found.offsets.size(), found.offsets.data()),
                        py::array_t<std::int64_t>(found.neighbours.size(), found.neighbours.data()),
                        py::array_t<double>(found.strengths.size(), found.strengths.data()));
}

PYBIND11_MODULE(_catalog, m) {
  m.doc() = "Work on whole catalogs: numpy arrays in and out, without torch.";
  m.def("co_occurrence", &co_occurrence, py::arg("items"), py::arg("offsets"), py::arg("num_items"), py::arg("window"),
        py::arg("min_count"), py::arg("max_per_item"), py::arg("is_ppmi"), py::arg("discount"),
        "co_occurrence(items, offsets, num_items, window, min_count, max_per_item, is_ppmi, discount)\n"
        "    -> (offsets, neighbours, strengths)\n\n"
        "items: int64 [E], those of all sequences; offsets: int64 [S + 1], where each sequence starts.\n"
        "offsets: int64 [num_items + 1]; item i has neighbours[offsets[i]:offsets[i + 1]], int64, strongest first,\n"
        "and strengths, float64. h2rec.data.co_occurrence says what they are.");
  m.def("group_codes", &group_codes, py::arg("codes"),
        "group_codes(codes) -> (order, starts)\n\n"
        "codes: int32 [num_items, num_levels], C-contiguous, not negative.\n"
        "order: int64 [num_items], item ids sorted by their row of codes; equal rows by item id.\n"
        "starts: int64 [num_groups + 1]; group g of items with equal codes is order[starts[g]:starts[g + 1]].");
  m.def("place_items", &place_items, py::arg("prefixes"), py::arg("candidates"), py::arg("settled_prefixes"),
        py::arg("settled_codes"), py::arg("num_codes"), py::arg("capacity"),
        "place_items(prefixes, candidates, settled_prefixes, settled_codes, num_codes, capacity) -> choices\n\n"
        "prefixes: int64 [M], ascending; of equal ones those that choose first stand first.\n"
        "candidates: int32 [M, C], last codes in [0, num_codes), the best first.\n"
        "settled_prefixes, settled_codes: int64 [S], ascending, and int32 [S]: who has a place already.\n"
        "choices: int32 [M]; the column of the candidate that has room for the item, -1 if none has. At most capacity\n"
        "items get the same prefix and code.");
}
