// The cache's face to Python.
#include <algorithm>
#include <iterator>

#include "arrays.h"
#include "cache.h"

namespace hopskip {

namespace {

Cache make_cache(const std::string& dtype, int64_t layers, int64_t slots, int64_t kv_heads, int64_t length,
                 int64_t head_dim) {
    const char* const types[] = {"float32", "bfloat16", "int8"};  // in the order of CacheType
    const auto found = std::find(std::begin(types), std::end(types), dtype);
    if (found == std::end(types)) refuse("dtype is ", dtype, "; it must be float32, bfloat16 or int8");
    constexpr int64_t most = 1 << 30;
    return Cache(static_cast<CacheType>(found - types), in_range(layers, "layers", 1, most),
                 in_range(slots, "slots", 1, most), in_range(kv_heads, "kv_heads", 1, most),
                 in_range(length, "length", 1, most), in_range(head_dim, "head_dim", 1, MAX_HEAD_DIM));
}

void copy_prefix(Cache& cache, int64_t source, int64_t target, int64_t length) {
    const int from = in_range(source, "source", 0, cache.slots() - 1);
    const int to = in_range(target, "target", 0, cache.slots() - 1);
    if (from == to) refuse("source and target are both ", source);
    cache.copy_prefix(from, to, in_range(length, "length", 0, cache.length()));
}

void keep_path(Cache& cache, int64_t slot, int64_t start, const std::vector<int32_t>& rows) {
    in_range(start, "start", 0, cache.length() - 1);
    for (size_t i = 0; i < rows.size(); ++i)
        in_range(rows[i], "a row", i ? rows[i - 1] + int64_t{1} : 0, cache.length() - 1 - start);
    cache.keep_path(in_range(slot, "slot", 0, cache.slots() - 1), static_cast<int>(start), rows);
}

void copy_from(Cache& cache, Cache& other) {
    const auto is_same = [](const CacheLayout& a, const CacheLayout& b) {
        return a.type == b.type && a.head_dim == b.head_dim;
    };
    if (!is_same(cache.layout(), other.layout()) || cache.layers() != other.layers() ||
        cache.kv_heads() != other.kv_heads())
        refuse("the other cache is of another kind");
    in_range(other.slots(), "the other cache's number of slots", 1, cache.slots());
    in_range(other.length(), "the other cache's length", 1, cache.length());
    cache.copy_from(other);
}

}  // namespace

void bind_cache(nb::module_& m) {
    nb::class_<Cache>(
        m, "Cache",
        "Keys and values of all layers, for some sequences. dtype: float32, bfloat16 or int8. See native/kernels.h "
        "for the layout of `bytes`, uint8 [layers, slots, key/value heads, bytes of a head].")
        .def("__init__", constructor(&make_cache), nb::kw_only(), "dtype"_a, "layers"_a, "slots"_a, "kv_heads"_a,
             "length"_a, "head_dim"_a)
        .def_prop_ro("nbytes", &Cache::bytes)
        .def_prop_ro(
            "bytes",
            [](Cache& cache) {
                const auto size_of = [](int size) { return static_cast<size_t>(size); };
                const size_t heads = size_of(cache.layers()) * cache.slots() * cache.kv_heads();
                return nb::ndarray<nb::numpy, uint8_t>(
                    cache.data(), {size_of(cache.layers()), size_of(cache.slots()), size_of(cache.kv_heads()),
                                   cache.bytes() / heads});
            },
            nb::rv_policy::reference_internal)
        .def("copy_prefix", &copy_prefix, "source"_a, "target"_a, "length"_a)
        .def("keep_path", &keep_path, "slot"_a, "start"_a, "rows"_a)
        .def("copy_from", &copy_from, "other"_a)
        .def("clear", &Cache::clear);
}

}  // namespace hopskip
