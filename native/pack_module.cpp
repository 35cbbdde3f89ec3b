// What Python calls to pack weights and to look at packed ones.
#include "arrays.h"
#include "pack.h"

namespace hopskip {

const Kernels& kernels_for(const std::string& isa);

namespace {

constexpr const char* STORED_NAMES[] = {"F32",    "F16",    "BF16",  "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                        "IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"};
static_assert(std::size(STORED_NAMES) == NUM_STORED);

Stored stored_named(const std::string& name) {
    const auto found = std::find(std::begin(STORED_NAMES), std::end(STORED_NAMES), name);
    if (found == std::end(STORED_NAMES)) refuse("stored is ", name, ", a type that has no format of its own");
    return static_cast<Stored>(found - STORED_NAMES);
}

class Packer {
public:
    Packer(const std::string& isa, int64_t threads)
        : kernels_(kernels_for(isa)), pool_(in_range(threads, "threads", 1, 1024)) {}

    const char* pack(int format, const std::string& stored, const Input& rows, int64_t cols, const OptionalInput& order,
                     const OptionalInput& weights, const Output& out) {
        PackTask task{};
        task.stored = stored_named(stored);
        const StoredType type = stored_type(task.stored);
        const int64_t row_bytes = cols / type.values * type.bytes;
        if (cols % type.values) refuse("cols is ", cols, "; ", stored, " has blocks of ", type.values);
        task.rows = checked<uint8_t>(rows, "rows", {ANY, row_bytes});
        task.row_bytes = row_bytes;
        const int given = size_of(rows, 0);
        std::vector<int32_t> places;
        if (order) {
            places = copied<int32_t>(*order, "order");
            for (int32_t place : places) in_range(place, "a row", 0, given - 1);
            task.order = places.data();
        }
        task.matrix = checked_shape(format, order ? std::ssize(places) : given, cols);
        const bool is_plain = task.stored <= Stored::bf16;
        const bool fits = is_plain ? task.matrix.format <= Format::q4 : task.matrix.format == type.format;
        if (!fits) refuse("weights stored as ", stored, " are not packed to format ", format);
        if ((task.matrix.format == Format::q4 && is_plain) != !!weights) refuse("weights go with q4, from floats");
        if (weights) task.weights = checked<float>(*weights, "weights", {task.matrix.blocks * BLOCK});
        task.out = checked<uint8_t>(out, "out", {task.matrix.strips, task.matrix.strip_bytes});
        nb::gil_scoped_release release;
        switch (hopskip::pack(pool_, kernels_, task)) {
            case PackError::not_finite: return "a weight is infinite or not a number";
            case PackError::scale_too_large: return "a scale does not fit float16";
            case PackError::none: break;
        }
        return nullptr;
    }

private:
    const Kernels& kernels_;
    Pool pool_;
};

Matrix given_matrix(int format, int64_t rows, int64_t cols, const Input& data) {
    Matrix m = checked_shape(format, rows, cols);
    m.data = reinterpret_cast<const uint8_t*>(checked<int32_t>(data, "data", {m.strips, m.strip_bytes / 4}));
    return m;
}

std::vector<int32_t> chosen_rows(const Input& chosen, const Matrix& m) {
    auto rows = copied<int32_t>(chosen, "chosen");
    for (int32_t row : rows) in_range(row, "a row", 0, m.rows - 1);
    return rows;
}

void unpack(int format, int64_t rows, int64_t cols, const Input& data, const Input& chosen, const Output& out) {
    const Matrix m = given_matrix(format, rows, cols, data);
    const auto which = chosen_rows(chosen, m);
    float* to = checked<float>(out, "out", {std::ssize(which), m.cols});
    nb::gil_scoped_release release;
    for (int32_t row : which) {
        unpack_row(m, row, to);
        to += m.cols;
    }
}

void select(int format, int64_t rows, int64_t cols, const Input& data, const Input& chosen, const Output& out) {
    const Matrix m = given_matrix(format, rows, cols, data);
    const auto which = chosen_rows(chosen, m);
    if (which.empty()) refuse("chosen has no rows");
    const Matrix selected = matrix_of(m.format, static_cast<int>(which.size()), m.cols);
    auto* to = checked<int32_t>(out, "out", {selected.strips, selected.strip_bytes / 4});
    nb::gil_scoped_release release;
    select_rows(m, which.data(), selected.rows, reinterpret_cast<uint8_t*>(to));
}

}  // namespace

void bind_pack(nb::module_& m) {
    const auto none = nb::none();
    m.def("unpack", &unpack, "format"_a, "rows"_a, "cols"_a, "data"_a, "chosen"_a, "out"_a,
          "Rows int32 `chosen` of a packed matrix, float32 [chosen, cols].");
    m.def("select_rows", &select, "format"_a, "rows"_a, "cols"_a, "data"_a, "chosen"_a, "out"_a,
          "Rows int32 `chosen` of a packed matrix, as a packed matrix: int32 [strips, words of a strip].");
    nb::class_<Packer>(m, "Packer", "Packs weights on threads of its own.")
        .def(nb::init<const std::string&, int64_t>(), "isa"_a, "threads"_a)
        .def("pack", &Packer::pack, nb::kw_only(), "format"_a, "stored"_a, "rows"_a, "cols"_a, "order"_a = none,
             "weights"_a = none, "out"_a,
             "Packs rows, uint8 [rows, bytes of a row], or those of them that int32 `order` lists, into uint8 [strips, "
             "bytes of a strip]. Returns what is wrong with the weights, or None.");
}

}  // namespace hopskip
