#include "place_items.h"

#include <stdexcept>
#include <string>

namespace h2rec::catalog {
namespace {

// How many items each last code of the current prefix has. A count of an earlier prefix is no count.
class Loads {
 public:
  Loads(std::int64_t num_codes, std::int64_t capacity) : loads_(num_codes), capacity_(capacity) {}

  void start(std::int64_t prefix) { prefix_ = prefix; }

  void add(std::int32_t code) { ++at(code); }

  bool add_if_room(std::int32_t code) {
    std::int64_t& load = at(code);
    if (load >= capacity_) return false;
    ++load;
    return true;
  }

 private:
  struct Load {
    std::int64_t prefix = -1, count = 0;
  };

  std::int64_t& at(std::int32_t code) {
    if (code < 0 || code >= static_cast<std::int64_t>(loads_.size())) {
      throw std::invalid_argument("codes must lie in [0, " + std::to_string(loads_.size()) + "), got " +
                                  std::to_string(code));
    }
    Load& load = loads_[code];
    if (load.prefix != prefix_) load = {prefix_, 0};
    return load.count;
  }

  std::vector<Load> loads_;
  std::int64_t capacity_, prefix_ = -1;
};

}  // namespace

std::vector<std::int32_t> place_items(const Wishes& wishes, const Settled& settled, std::int64_t num_codes,
                                      std::int64_t capacity) {
  std::vector<std::int32_t> choices(wishes.num_items, -1);
  Loads loads(num_codes, capacity);
  std::int64_t next_settled = 0;
  for (std::int64_t first = 0, last; first < wishes.num_items; first = last) {
    const std::int64_t prefix = wishes.prefixes[first];
    for (last = first; last < wishes.num_items && wishes.prefixes[last] == prefix;) ++last;
    loads.start(prefix);
    for (; next_settled < settled.num_items && settled.prefixes[next_settled] <= prefix; ++next_settled) {
      if (settled.prefixes[next_settled] == prefix) loads.add(settled.codes[next_settled]);
    }
    for (std::int64_t item = first; item < last; ++item) {
      if (loads.add_if_room(wishes.candidates[item * wishes.num_candidates])) choices[item] = 0;
    }
    for (std::int64_t item = first; item < last; ++item) {
      const std::int32_t* candidates = wishes.candidates + item * wishes.num_candidates;
      for (std::int64_t rank = 1; choices[item] < 0 && rank < wishes.num_candidates; ++rank) {
        if (loads.add_if_room(candidates[rank])) choices[item] = static_cast<std::int32_t>(rank);
      }
    }
  }
  return choices;
}

}  // namespace h2rec::catalog
