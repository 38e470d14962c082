// The Python module mixer_kernels._cpu: kernels.h and tsmixer.h with addresses as integers and structs as tuples of
// their fields.
//
// No PyTorch here. mixer_kernels/backends/cpu is what calls these functions, and what says which tensors they take.
#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "tsmixer.h"

namespace py = pybind11;

namespace mixer_kernels::cpu {
namespace {

// The fields of a tuple, one after the other.
class Fields {
  public:
    explicit Fields(const py::tuple& tuple) : tuple_(tuple) {}

    ~Fields() noexcept(false) {
        if (next_ != tuple_.size() && !std::uncaught_exceptions()) throw std::invalid_argument("a tuple is too long");
    }

    template <class T>
    T next() {
        if (next_ == tuple_.size()) throw std::invalid_argument("a tuple is too short");
        return tuple_[next_++].cast<T>();
    }

    template <class T>
    T* address() {
        return reinterpret_cast<T*>(next<uintptr_t>());
    }

  private:
    const py::tuple& tuple_;
    size_t next_ = 0;
};

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Input input_of(const py::tuple& tuple) {
    Fields fields(tuple);
    Input x{};
    x.data = fields.address<const void>();
    for (int64_t& size : x.sizes) size = fields.next<int64_t>();
    for (int64_t& stride : x.strides) stride = fields.next<int64_t>();
    x.bf16 = fields.next<bool>();
    return x;
}

Mixer mixer_of(const py::tuple& tuple) {
    Fields fields(tuple);
    Mixer mixer{};
    for (const void** parameter :
         {&mixer.gamma, &mixer.beta, &mixer.w1, &mixer.b1, &mixer.w2, &mixer.b2, &mixer.w_gate, &mixer.b_gate})
        *parameter = fields.address<const void>();
    mixer.hidden = fields.next<int64_t>();
    mixer.eps = fields.next<float>();
    return mixer;
}

Gradients gradients_of(const py::tuple& tuple) {
    Fields fields(tuple);
    Gradients to{};
    for (float** gradient : {&to.gamma, &to.beta, &to.w1, &to.b1, &to.w2, &to.b2, &to.w_gate, &to.b_gate})
        *gradient = fields.address<float>();
    return to;
}

Options options_of(const py::tuple& tuple) {
    Fields fields(tuple);
    Options options{};
    options.gate_first = fields.next<bool>();
    options.sigmoid = fields.next<bool>();
    options.affine = fields.next<bool>();
    options.tanh = fields.next<bool>();
    options.bf16 = fields.next<bool>();
    options.dropout_p = fields.next<float>();
    options.seeds = fields.address<const int64_t>();
    return options;
}

// `mixers`: a tuple for each, and whether their parameters are bfloat16
Call call_of(const py::tuple& x, int axis, const py::tuple& mixers, const py::tuple& options) {
    Call call{};
    call.x = input_of(x);
    call.axis = axis;
    call.mixers = static_cast<int>(mixers.size()) - 1;
    if (call.mixers != 1 && call.mixers != 2) throw std::invalid_argument("a call has one mixer or two");
    for (int i = 0; i < call.mixers; ++i) call.mixer[i] = mixer_of(mixers[i]);
    call.bf16 = mixers[call.mixers].cast<bool>();
    call.options = options_of(options);
    return call;
}

const Kernels& kernels_of(const std::string& name) {
    const Kernels* kernels = find(name.c_str());
    if (!kernels) throw std::invalid_argument("no kernels for " + name + " that run here");
    return *kernels;
}

// A forward pass, all but the addresses of x, y and u.
class Forward {
  public:
    Forward(const std::string& name, const py::tuple& x, int axis, const py::tuple& mixers, const py::tuple& options,
            uintptr_t packs)
        : kernels_(kernels_of(name)), call_(call_of(x, axis, mixers, options)), packs_(at<const float>(packs)) {}

    void operator()(uintptr_t x, uintptr_t y, uintptr_t u, int threads) const {
        Call call = call_;
        call.x.data = at<const void>(x);
        call.y = at<void>(y);
        call.u = at<float>(u);
        const py::gil_scoped_release release;
        run_forward(kernels_, call, threads, packs_);
    }

  private:
    const Kernels& kernels_;
    const Call call_;
    const float* const packs_;
};

int64_t pack_size(const std::string& name, const py::tuple& x, int axis, const py::tuple& mixers,
                  const py::tuple& options) {
    return kernels_of(name).pack_size(call_of(x, axis, mixers, options));
}

void pack(const std::string& name, const py::tuple& x, int axis, const py::tuple& mixers, const py::tuple& options,
          uintptr_t packs) {
    kernels_of(name).pack(call_of(x, axis, mixers, options), at<float>(packs));
}

void backward(const std::string& name, uintptr_t dy, const py::tuple& x, int axis, const py::tuple& mixers,
              const py::tuple& options, uintptr_t u, uintptr_t dx, const py::tuple& gradients, int threads) {
    const Kernels& kernels = kernels_of(name);
    Call call = call_of(x, axis, mixers, options);
    call.dy = at<const float>(dy);
    call.kept_u = at<const float>(u);
    call.dx = at<float>(dx);
    for (int i = 0; i < call.mixers; ++i) call.gradients[i] = gradients_of(gradients[i]);
    const py::gil_scoped_release release;
    run_backward(kernels, call, threads);
}

template <class FLOAT>
TsmixerParameters<FLOAT> tsmixer_parameters_of(const py::tuple& tuple) {
    Fields fields(tuple);
    TsmixerParameters<FLOAT> p{};
    for (FLOAT** parameter : {&p.gamma, &p.beta, &p.w1, &p.b1, &p.w2, &p.b2, &p.w_skip, &p.b_skip})
        *parameter = fields.address<FLOAT>();
    return p;
}

// `form`: the sizes B, S, C, H, O, what is mixed, how.
TsmixerCall tsmixer_call_of(uintptr_t x, const py::tuple& form, const py::tuple& parameters) {
    Fields fields(form);
    TsmixerCall call{};
    call.x = at<const float>(x);
    for (int64_t* size : {&call.B, &call.S, &call.C, &call.H, &call.O}) *size = fields.next<int64_t>();
    call.features = fields.next<bool>();
    call.norm_first = fields.next<bool>();
    call.affine = fields.next<bool>();
    call.activation = static_cast<Activation>(fields.next<int>());
    call.eps = fields.next<float>();
    call.dropout_p = fields.next<float>();
    call.seed = fields.address<const int64_t>();
    call.parameters = tsmixer_parameters_of<const float>(parameters);
    return call;
}

const TsmixerKernels& tsmixer_of(const std::string& name) {
    const TsmixerKernels* kernels = find_tsmixer(name.c_str());
    if (!kernels) throw std::invalid_argument("no kernels for " + name + " that run here");
    return *kernels;
}

// A forward pass, all but the addresses of x and of what it writes.
class TsmixerForward {
  public:
    TsmixerForward(const std::string& name, const py::tuple& form, const py::tuple& parameters)
        : kernels_(tsmixer_of(name)), call_(tsmixer_call_of(0, form, parameters)) {}

    void operator()(uintptr_t x, uintptr_t y, uintptr_t z, uintptr_t v, int threads) const {
        TsmixerCall call = call_;
        call.x = at<const float>(x);
        call.y = at<float>(y);
        call.z = at<float>(z);
        call.v = at<float>(v);
        const py::gil_scoped_release release;
        run_forward(kernels_, call, threads);
    }

  private:
    const TsmixerKernels& kernels_;
    const TsmixerCall call_;
};

void tsmixer_backward(const std::string& name, uintptr_t dy, uintptr_t x, const py::tuple& form,
                      const py::tuple& parameters, uintptr_t z, uintptr_t v, uintptr_t dx, const py::tuple& gradients,
                      int threads) {
    const TsmixerKernels& kernels = tsmixer_of(name);
    TsmixerCall call = tsmixer_call_of(x, form, parameters);
    call.dy = at<const float>(dy);
    call.kept_z = at<const float>(z);
    call.kept_v = at<const float>(v);
    call.dx = at<float>(dx);
    call.gradients = tsmixer_parameters_of<float>(gradients);
    const py::gil_scoped_release release;
    run_backward(kernels, call, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    py::list names;
    for (const char* const* name = built(); *name; ++name) names.append(*name);
    module.attr("built") = py::tuple(names);
    module.def("runs_here", [](const std::string& name) { return runs_here(name.c_str()); });
    module.def("has_pool", &has_pool);
    module.def("pack_size", &pack_size);
    module.def("pack", &pack);
    py::class_<Forward>(module, "Forward")
        .def(py::init<const std::string&, const py::tuple&, int, const py::tuple&, const py::tuple&, uintptr_t>())
        .def("__call__", &Forward::operator());
    module.def("backward", &backward);
    py::class_<TsmixerForward>(module, "TsmixerForward")
        .def(py::init<const std::string&, const py::tuple&, const py::tuple&>())
        .def("__call__", &TsmixerForward::operator());
    module.def("tsmixer_backward", &tsmixer_backward);
}

}  // namespace mixer_kernels::cpu
