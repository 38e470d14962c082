// The Python module mixer_kernels._metadata: what a call compares before it repeats the one before.
//
// mixer_kernels/metadata.py says what is compared, in Python that computes the same.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace mixer_kernels::cpu {
namespace {

// DLPack's tensor and table of functions, as https://github.com/dmlc/dlpack lays them out since version 1.3.
struct DLTensor {
    void* data;
    int32_t device[2];
    int32_t dimensions;
    uint32_t dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DLPack {
    uint32_t major, minor;
    void* older;
    void *allocate, *to_managed, *from_managed;
    int (*view)(void* object, DLTensor* out);  // what `out` points to is the object's own
    void* stream;
};

// Describes tensors of the library whose DLPack table it is given.
class Describe {
  public:
    explicit Describe(const py::capsule& table)
        : dlpack_(*static_cast<const DLPack*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"))) {
        if (dlpack_.major != 1) throw std::runtime_error("expected version 1 of DLPack");
    }

    py::bytes operator()(const py::list& tensors) const {
        std::string text;
        text.reserve(tensors.size() * 64);
        for (const py::handle tensor : tensors) append(tensor, text);
        return text;
    }

  private:
    void append(py::handle tensor, std::string& text) const {
        if (tensor.is_none()) {
            text.push_back('-');
            return;
        }
        DLTensor view;
        if (dlpack_.view(tensor.ptr(), &view) != 0) throw py::error_already_set();
        const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg_.ptr()));
        if (!negated) throw py::error_already_set();
        text.push_back(negated.ptr() == Py_True ? 'n' : 't');
        const auto append_numbers = [&text](const auto* numbers, size_t count) {
            text.append(reinterpret_cast<const char*>(numbers), count * sizeof *numbers);
        };
        append_numbers(&view.data, 1);
        append_numbers(view.device, 2);
        append_numbers(&view.dimensions, 1);
        append_numbers(&view.dtype, 1);
        append_numbers(view.shape, view.dimensions);
        append_numbers(view.strides, view.dimensions);
    }

    const DLPack dlpack_;
    const py::str is_neg_ = "is_neg";
};

// A module as `metadata.Remembered` lists it.
enum Field { kModule, kClass, kSize, kNames, kRead, kValues, kChildren, kWeights };

class Unchanged {
  public:
    bool operator()(const py::list& modules) const {
        for (const py::handle remembered : modules)
            if (!is_unchanged(remembered.ptr())) return false;
        return true;
    }

  private:
    bool is_unchanged(PyObject* remembered) const {
        const auto field = [remembered](Field i) { return PyTuple_GET_ITEM(remembered, i); };
        const py::handle module = field(kModule);
        if (reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != field(kClass)) return false;
        const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
        if (!attributes || !PyDict_Check(attributes.ptr())) throw py::error_already_set();
        if (PyDict_Size(attributes.ptr()) != PyLong_AsSsize_t(field(kSize))) return false;
        for (const py::handle name : hooks_) {
            PyObject* hooks = PyDict_GetItem(attributes.ptr(), name.ptr());
            if (!hooks || PyObject_IsTrue(hooks) != 0) return false;
        }
        PyObject *children = field(kChildren), *weights = field(kWeights);
        return have(attributes, field(kNames), field(kValues)) &&
               (PyDict_Size(children) == 0 || is_equal(attributes, modules_, children)) &&
               (PyTuple_GET_SIZE(weights) == 0 || have_classes(attributes, weights));
    }

    static bool have(py::handle attributes, PyObject* names, PyObject* values) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i)
            if (!is_equal(attributes, PyTuple_GET_ITEM(names, i), PyTuple_GET_ITEM(values, i))) return false;
        return true;
    }

    static bool is_equal(py::handle attributes, py::handle name, py::handle value) {
        PyObject* now = PyDict_GetItem(attributes.ptr(), name.ptr());
        if (!now) return false;
        const int equal = PyObject_RichCompareBool(now, value.ptr(), Py_EQ);
        if (equal < 0) throw py::error_already_set();
        return equal;
    }

    // Whether the parameters have these classes, one after the other.
    bool have_classes(py::handle attributes, PyObject* classes) const {
        PyObject* tensors = PyDict_GetItem(attributes.ptr(), parameters_.ptr());
        if (!tensors || PyDict_Size(tensors) != PyTuple_GET_SIZE(classes)) return false;
        PyObject *name, *tensor;
        Py_ssize_t at = 0;
        for (Py_ssize_t i = 0; PyDict_Next(tensors, &at, &name, &tensor); ++i)
            if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != PyTuple_GET_ITEM(classes, i)) return false;
        return true;
    }

    const py::str modules_ = "_modules", parameters_ = "_parameters";
    const py::tuple hooks_ =
        py::make_tuple("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks");
};

}  // namespace

PYBIND11_MODULE(_metadata, module) {
    py::class_<Describe>(module, "Describe").def(py::init<const py::capsule&>()).def("__call__", &Describe::operator());
    py::class_<Unchanged>(module, "Unchanged").def(py::init()).def("__call__", &Unchanged::operator());
}

}  // namespace mixer_kernels::cpu
