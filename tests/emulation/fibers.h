// SPDX-License-Identifier: Apache-2.0
// Fibers: many stacks on one thread, of which one runs. Switching is a few instructions on x86-64 (the callee-saved
// registers and the stack pointer) and swapcontext elsewhere, or where SKTEST_UCONTEXT is defined.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(SKTEST_UCONTEXT)
#define SKTEST_UCONTEXT
#endif
#ifdef SKTEST_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SKTEST_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SKTEST_ADDRESS_SANITIZER
#endif
#endif
#ifdef SKTEST_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

namespace sktest {
namespace emulation {

#ifndef SKTEST_UCONTEXT
// Saves the caller's registers on its stack and its stack pointer in *from, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void ** /*from*/, void * /*to*/) {
    asm volatile("pushq %%rbp\n\tpushq %%rbx\n\tpushq %%r12\n\tpushq %%r13\n\tpushq %%r14\n\tpushq %%r15\n\t"
                 "movq %%rsp, (%%rdi)\n\tmovq %%rsi, %%rsp\n\t"
                 "popq %%r15\n\tpopq %%r14\n\tpopq %%r13\n\tpopq %%r12\n\tpopq %%rbx\n\tpopq %%rbp\n\tret" ::
                     : "memory");
}
#endif

// A stack of its own, or (without create) the stack of whoever switches away from it.
class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;
    ~Fiber() {
        if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
    }

    bool created() const { return mapped_ != nullptr; }

    // `entry` never returns. The page below the stack is protected: an overflow faults.
    void create(size_t stack_bytes, void (*entry)()) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        stack_bytes_ = (stack_bytes + page - 1) / page * page;
        mapped_bytes_ = stack_bytes_ + page;
        void *mapped =
            mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::runtime_error("emulation: no memory for a fiber's stack");
        mapped_ = static_cast<char *>(mapped);
        mprotect(mapped_, page, PROT_NONE);
        bottom_ = mapped_ + page;
#ifdef SKTEST_UCONTEXT
        getcontext(&context_);
        context_.uc_stack.ss_sp = mapped_ + page;
        context_.uc_stack.ss_size = stack_bytes_;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#else
        // What switch_stack pops: six registers and the address it returns to, above which lies a null return address
        // at 8 modulo 16, where a call would have put it.
        void **top = reinterpret_cast<void **>(mapped_ + mapped_bytes_) - 1;
        *top = nullptr;
        *--top = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer_ = top;
#endif
    }

    // Leaves `from`, which runs, for this fiber; returns when something switches back to `from`.
    void run(Fiber &from) {
#ifdef SKTEST_ADDRESS_SANITIZER
        __sanitizer_start_switch_fiber(&from.fake_stack_, bottom_, stack_bytes_);
        left_ = &from;
#endif
#ifdef SKTEST_UCONTEXT
        swapcontext(&from.context_, &context_);
#else
        switch_stack(&from.stack_pointer_, stack_pointer_);
#endif
        from.arrived();
    }

    // First thing on the stack of a fiber (run calls it on the way back).
    void arrived() {
#ifdef SKTEST_ADDRESS_SANITIZER
        const void *bottom = nullptr;
        size_t bytes = 0;
        __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
        // The bounds of a stack that was not created here are known from the first switch away from it.
        if (left_ != nullptr && left_->bottom_ == nullptr) {
            left_->bottom_ = bottom;
            left_->stack_bytes_ = bytes;
        }
#endif
    }

private:
    char *mapped_ = nullptr;
    size_t mapped_bytes_ = 0;
    const void *bottom_ = nullptr;
    size_t stack_bytes_ = 0;
#ifdef SKTEST_UCONTEXT
    ucontext_t context_{};
#else
    void *stack_pointer_ = nullptr;
#endif
#ifdef SKTEST_ADDRESS_SANITIZER
    void *fake_stack_ = nullptr;
    Fiber *left_ = nullptr;
#endif
};

}  // namespace emulation
}  // namespace sktest
