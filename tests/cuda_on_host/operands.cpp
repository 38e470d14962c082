#include "operands.h"

namespace cuda_on_host {

SharedOperand::SharedOperand(uint64_t descriptor, bool mn_major, const Thread& issuer, Where where)
    : mn_major_(mn_major), issuer_(issuer), where_(where) {
    const auto field = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
    constexpr int widths[] = {0, 128, 64, 32};
    width_ = widths[descriptor >> 62];
    start_ = static_cast<shared_address>(field(0));
    leading_ = field(16);
    stride_ = field(32);
    if ((descriptor >> 49 & 7) != 0) fault(issuer, "wgmma: a descriptor with a base offset is not modelled", where);
    const int pattern = 8 * width_;
    // Bits 7 and up of the start that the swizzle reads: rows of 128 bytes into the pattern.
    if (width_ != 0 && start_ % pattern / 128 != 0) {
        fault(issuer,
              "wgmma: the pattern of an operand with a swizzle of " + std::to_string(width_) +
                  " bytes begins at address " + std::to_string(start_) +
                  ", not in the first 128 bytes from a multiple of " + std::to_string(pattern),
              where);
    }
}

void SharedOperand::fetch(shared_address address, uint16_t (&eight)[8]) const {
    const Block& block = *issuer_.block;
    const shared_address at = swizzled(address, width_);
    const shared_address offset = at - window_of(block);
    if (offset + sizeof(eight) > block.shared.bytes || offset > block.shared.bytes) {
        fault(issuer_,
              "wgmma reads an operand at " + place_in(block, at) + ", of " + std::to_string(block.shared.bytes) +
                  " bytes",
              where_);
    }
    const char* from = block.shared.begin + offset;
    check_async_read(block, "wgmma", from, issuer_, where_);
    kernel_reads(from, sizeof(eight));
    std::memcpy(eight, from, sizeof(eight));
}

void check_operand(shared_address start, int leading_bytes, int stride_bytes, Where where) {
    const Unseen unseen;
    const auto check = [&](const char* what, int64_t bytes) {
        if (bytes % 16 != 0 || bytes < 0 || bytes >= 1 << 18) {
            fault(std::string("operand: ") + what + " " + std::to_string(bytes) + ", not a multiple of 16 below 256 Ki",
                  where);
        }
    };
    check("the start", start);
    check("the leading offset", leading_bytes);
    check("the stride offset", stride_bytes);
}

}  // namespace cuda_on_host
