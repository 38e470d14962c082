// Products of a warpgroup: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// A warp computes its own 16 of the 64 rows, in the order of issue. It may as soon as its lanes have come to the
// instruction, and does not before all four warps have, where work is late. Between, the accumulators are NaN.

#include "warpgroup.h"

#include "asynchronous.h"
#include "machine.h"
#include "operands.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

constexpr int LANES = 32, WARPS = 4, ROWS = 16;
constexpr uint32_t NOT_YET = 0x7fadface;  // a signaling NaN: arithmetic changes its bits, copies do not

// What all threads of a warpgroup give the same.
struct Form {
    Operands type;
    int N;
    bool a_in_registers, a_mn_major, b_mn_major, accumulate;
    uint64_t a, b;
    bool operator==(const Form&) const = default;
};

}  // namespace

class Product : public Operation {
  public:
    Product(const Form& form, uint64_t number, Where where)
        : form_(form),
          block_(*current->block),
          warp_(current->warp),
          issuer_(*current),
          number_(number),
          where_(where) {}

    void add_lane(const Form& form, float* d, const uint32_t* a, Where where) {
        if (form != form_) fault("wgmma of other operands than in other lanes, which are in " + place(where_), where);
        Products& products = of(warp_);
        const int lane = current->lane;
        Accumulator* known = nullptr;
        for (Accumulator& accumulator : products.accumulators) {
            if (accumulator.registers[lane] == d) known = &accumulator;
        }
        if (accumulator_ == nullptr) {
            if (known == nullptr) known = &products.accumulators.emplace_back();
            accumulator_ = known;
            accumulator_->N = accumulator_->products == 0 ? form_.N : accumulator_->N;
            ++accumulator_->products;
        }
        if (known != nullptr && known != accumulator_) fault("wgmma of other accumulators than in other lanes", where);
        if (accumulator_->N != form_.N) {
            fault("wgmma of N " + std::to_string(form_.N) + " into accumulators of one of N " +
                      std::to_string(accumulator_->N) + " that is under way",
                  where);
        }
        if (accumulator_->registers[lane] == nullptr) gather(lane, d);
        if (a != nullptr) std::copy(a, a + 4, a_[lane]);
        ++lanes_;
        release(static_cast<Operation*>(this));
    }

    bool ready() const override {
        if (lanes_ < LANES || of(warp_).over != number_) return false;
        return settings().landing == Landing::early || all_warps_have_issued();
    }

    bool awaited() const override {
        const auto& waiting = of(warp_).waiting;
        return std::any_of(waiting.begin(), waiting.end(),
                           [&](const Thread* thread) { return thread->products_awaited > number_; });
    }

    std::string when_left() const override { return ""; }  // check_products sees to it

    void happen() override {
        multiply();
        Products& products = of(warp_);
        if (--accumulator_->products == 0) {
            scatter();
            products.accumulators.remove_if([&](const Accumulator& one) { return &one == accumulator_; });
        }
        release(&products.order);
        products.under_way.pop_front();
        ++products.over;
        std::vector<Thread*> done;
        std::erase_if(products.waiting, [&](Thread* thread) {
            if (thread->products_awaited > products.over) return false;
            done.push_back(thread);
            return true;
        });
        wake(done);
    }

    const Form& form() const { return form_; }
    Where where() const { return where_; }

  private:
    Products& of(int warp) const { return *block_.products[warp]; }

    bool all_warps_have_issued() const {
        const int first = warp_ / WARPS * WARPS;
        for (int warp = first; warp < first + WARPS; ++warp) {
            const Products& products = of(warp);
            if (products.begun <= number_) return false;
            if (products.over <= number_ && products.under_way[number_ - products.over]->lanes_ < LANES) return false;
        }
        return true;
    }

    // D's fragments: rows lane / 4 and 8 on, columns 8 j + 2 (lane % 4) and the next.
    template <class F>
    static void for_each_register(int lane, int N, F f) {
        for (int i = 0; i < N / 2; ++i) f(i, lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
    }

    void gather(int lane, float* d) {
        accumulator_->registers[lane] = d;
        const float unknown = bits_of<float>(NOT_YET);
        for_each_register(lane, form_.N, [&](int i, int row, int column) {
            accumulator_->values[row][column] = d[i];
            if (settings().landing != Landing::early) d[i] = unknown;
        });
    }

    void scatter() const {
        for (int lane = 0; lane < LANES; ++lane) {
            float* d = accumulator_->registers[lane];
            for_each_register(lane, form_.N, [&](int i, int row, int column) {
                if (settings().landing != Landing::early && bits_of<uint32_t>(d[i]) != NOT_YET) {
                    fault(issuer_, "accumulators of a wgmma under way were written", where_);
                }
                d[i] = accumulator_->values[row][column];
            });
        }
    }

    void multiply() const {
        alignas(64) float a[ROWS][16], b[16][256];
        if (form_.a_in_registers) {
            const auto decode = form_.type == Operands::bfloat16 ? from_bfloat16 : from_float16;
            for (int lane = 0; lane < LANES; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
                    a[row][k] = decode(static_cast<uint16_t>(a_[lane][i]));
                    a[row][k + 1] = decode(static_cast<uint16_t>(a_[lane][i] >> 16));
                }
            }
        } else {
            const int first = warp_ % WARPS * ROWS;
            const SharedOperand operand(form_.a, form_.a_mn_major, issuer_, where_);
            operand.read(form_.type, first, ROWS, [&](int row, int k, float value) { a[row - first][k] = value; });
        }
        const SharedOperand operand(form_.b, form_.b_mn_major, issuer_, where_);
        operand.read(form_.type, 0, form_.N, [&](int column, int k, float value) { b[k][column] = value; });
        multiply_add(a, b, form_.N, form_.accumulate, accumulator_->values);
        matrix_products += form_.N / 8;
        warpgroup_products += form_.N / 8;
    }

    CUDA_ON_HOST_FAST static void multiply_add(const float (&a)[ROWS][16], const float (&b)[16][256], int N,
                                               bool accumulate, float (&d)[ROWS][256]) {
        constexpr int width = 8;  // columns whose sums stay in registers
        for (int row = 0; row < ROWS; ++row) {
            for (int first = 0; first < N; first += width) {
                float sums[width] = {};
                for (int k = 0; k < 16; ++k) {
                    for (int i = 0; i < width; ++i) sums[i] += a[row][k] * b[k][first + i];
                }
                for (int i = 0; i < width; ++i) {
                    d[row][first + i] = accumulate ? d[row][first + i] + sums[i] : sums[i];
                }
            }
        }
    }

    Form form_;
    Block& block_;
    int warp_;
    const Thread& issuer_;
    uint64_t number_;  // among the warp's
    Where where_;
    int lanes_ = 0;
    Accumulator* accumulator_ = nullptr;
    uint32_t a_[LANES][4];
};

namespace {

Products& products_of(const Thread& thread) {
    Block& block = *thread.block;
    if (block.products.empty()) {
        for (int i = 0; i < block.threads; i += LANES) block.products.push_back(std::make_unique<Products>());
    }
    return *block.products[thread.warp];
}

void issue(const Form& form, float* d, const uint32_t* a, Where where) {
    Thread& self = *current;
    let_operations_happen();
    if ((self.warp / WARPS + 1) * WARPS * LANES > self.block->threads) {
        fault("wgmma outside of whole warpgroups of 128 threads, in a block of " + std::to_string(self.block->threads),
              where);
    }
    if (form.N < 8 || form.N > 256 || form.N % 8 != 0) {
        fault("wgmma of N " + std::to_string(form.N) + ", not a multiple of 8 from 8 to 256", where);
    }
    if (!self.registers_fenced) {
        fault(
            "wgmma without a wgmma_fence since the last wgmma_wait, which orders it after what was written to its "
            "registers",
            where);
    }
    Products& products = products_of(self);
    const uint64_t number = self.products++;
    if (number == products.begun) {
        // The other warps of the warpgroup issue the same.
        const int first = self.warp / WARPS * WARPS;
        for (int warp = first; warp < first + WARPS; ++warp) {
            const Products& others = *self.block->products[warp];
            if (others.begun <= number || others.over > number) continue;
            const Product& other = *others.under_way[number - others.over];
            if (other.form() != form) {
                fault("wgmma of other operands than in other warps of the warpgroup, which are in " +
                          place(other.where()),
                      where);
            }
        }
        const auto product = std::make_shared<Product>(form, number, where);
        products.under_way.push_back(product);
        ++products.begun;
        begin(product);
    }
    products.under_way[number - products.over]->add_lane(form, d, a, where);
    let_operations_happen();
}

}  // namespace

void wgmma(Operands type, int N, float* d, const uint32_t* a, uint64_t b, bool b_mn_major, bool accumulate,
           Where where) {
    const Unseen unseen;
    issue({type, N, true, false, b_mn_major, accumulate, 0, b}, d, a, where);
}

void wgmma(Operands type, int N, float* d, uint64_t a, bool a_mn_major, uint64_t b, bool b_mn_major, bool accumulate,
           Where where) {
    const Unseen unseen;
    issue({type, N, false, a_mn_major, b_mn_major, accumulate, a, b}, d, nullptr, where);
}

void wgmma_fence() { current->registers_fenced = true; }

void wgmma_commit() {
    const Unseen unseen;
    current->product_groups.push_back(current->products);
    let_operations_happen();
    give_way();
}

void wait_for_products(int groups, Where where) {
    const Unseen unseen;
    let_operations_happen();
    give_way();
    Thread& self = *current;
    self.registers_fenced = false;
    uint64_t target = 0;
    while (static_cast<int>(self.product_groups.size()) > groups) {
        target = self.product_groups.front();
        self.product_groups.pop_front();
    }
    if (target == 0) return;
    Products& products = products_of(self);
    if (products.over < target) {
        self.products_awaited = target;
        products.waiting.push_back(&self);
        sleep("wgmma_wait", where);
    }
    acquire(&products.order);
}

void check_products(const Thread& thread) {
    if (thread.products == 0) return;
    const Products& products = *thread.block->products[thread.warp];
    if (products.over < thread.products) {
        fault("returns while its wgmma is under way", products.under_way.front()->where());
    }
}

// Here, where Products is complete.
Block::Block(uint3 index_, int rank_, int threads_, SharedMemory shared_, Cluster& cluster_)
    : index(index_), rank(rank_), threads(threads_), shared(shared_), cluster(cluster_) {}
Block::~Block() = default;

}  // namespace cuda_on_host
