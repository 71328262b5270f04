// Finds operands that share memory: first by their extents, then by a search over their strides.
#include "sharing.h"

#include <algorithm>
#include <map>

namespace pyfeedback {

namespace {

// Equal to MOST_TRIED of pyfeedback/core/overlap.py.
constexpr int kMostTried = 10000;

// Decides whether a total is a sum of k * step over the terms (step, most), with some k in 0..most for each. Also
// returns true if the search takes more than kMostTried tries.
class SumSearch {
 public:
  explicit SumSearch(const std::map<int64_t, int64_t>& terms) {
    for (const auto& [step, most] : terms) {
      if (step == 0 || most == 0) continue;
      terms_.push_back({step, most});
      within_.push_back(within_.back() + step * most);
    }
  }

  bool reaches(int64_t total) { return search(total, terms_.size()); }

 private:
  struct Term {
    int64_t step, most;
  };

  bool search(int64_t total, size_t count) {
    if (++tried_ > kMostTried) return true;
    if (count == 0 || total < 0 || total > within_[count]) return total == 0;
    const auto [step, most] = terms_[count - 1];
    const int64_t least = std::max<int64_t>(0, (total - within_[count - 1] + step - 1) / step);
    for (int64_t k = least; k <= std::min(most, total / step); ++k) {
      if (search(total - step * k, count - 1)) return true;
    }
    return false;
  }

  std::vector<Term> terms_;            // sorted by step
  std::vector<int64_t> within_ = {0};  // the largest sums of the first 0, 1, ... terms
  int tried_ = 0;
};

// Whether a.begin + sum(stride * index) + byte is equal for both, for some indices and bytes.
bool share_a_byte(const Span& a, const Span& b) {
  std::map<int64_t, int64_t> terms;
  for (const Span* span : {&a, &b}) {
    const Shape shape = shape_of(span->tensor);
    const int64_t bytes = element_size(dtype_of(span->tensor));
    terms[1] += bytes - 1;
    for (int64_t d = 0; d < shape.dims; ++d) terms[shape.stride[d] * bytes] += shape.size[d] - 1;
  }
  // The indices of b count down from the last one, so that every term adds. The total is then the distance from the
  // beginning of a to the end of b.
  return SumSearch(terms).reaches(static_cast<int64_t>(b.end - 1 - a.begin));
}

bool conflict(const Span& written, const Span& other, const std::vector<uint32_t>& chain) {
  if (written.end <= other.begin || other.end <= written.begin) return false;
  const bool read_in_order = written.stepped && !other.written && other.row <= written.row &&
                             chain[other.row] == chain[written.row] &&
                             same_view(read_view(written.tensor, ""), read_view(other.tensor, ""));
  return !read_in_order && share_a_byte(written, other);
}

}  // namespace

void check_sharing(const std::vector<Span>& spans, const std::vector<uint32_t>& chain) {
  // Sorting only the addresses moves a quarter of the bytes. Spans come list by list and mostly in the order of their
  // addresses, which makes a merge sort fast.
  struct Begin {
    uintptr_t at;
    uint32_t span;
  };
  std::vector<Begin> order;
  order.reserve(spans.size());
  for (const Span& span : spans) order.push_back({span.begin, static_cast<uint32_t>(order.size())});
  std::stable_sort(order.begin(), order.end(), [](const Begin& a, const Begin& b) { return a.at < b.at; });
  for (size_t first = 0, last; first < order.size(); first = last) {
    uintptr_t reach = spans[order[first].span].end;
    for (last = first + 1; last < order.size() && order[last].at < reach; ++last) {
      reach = std::max(reach, spans[order[last].span].end);
    }
    for (size_t i = first; last - first > 1 && i < last; ++i) {
      const Span& a = spans[order[i].span];
      for (size_t j = first; a.written && j < last; ++j) {
        const Span& b = spans[order[j].span];
        if (i == j || (j < i && b.written)) continue;
        STD_TORCH_CHECK(!conflict(a, b, chain), "row ", a.row, " writes memory that it shares with row ", b.row);
      }
    }
  }
}

bool overlaps_itself(const Shape& shape) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < shape.dims; ++d) {
    if (shape.size[d] > 1) dims.push_back({shape.stride[d], shape.size[d]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  bool nested = true;
  for (const auto& [stride, size] : dims) {
    nested = nested && stride > reach;
    reach += stride * (size - 1);
  }
  if (nested || shape.numel == 0) return false;
  // Search for two indices whose first difference is in dimension k and at least 1.
  for (size_t k = 0; k < dims.size(); ++k) {
    std::map<int64_t, int64_t> terms = {{dims[k].first, dims[k].second - 2}};
    int64_t total = -dims[k].first;
    for (size_t m = k + 1; m < dims.size(); ++m) {
      terms[dims[m].first] += 2 * (dims[m].second - 1);
      total += dims[m].first * (dims[m].second - 1);
    }
    if (SumSearch(terms).reaches(total)) return true;
  }
  return false;
}

}  // namespace pyfeedback
