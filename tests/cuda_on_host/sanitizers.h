// What the sanitizers have to be told of fibers: where their stacks are, and what orders their accesses to memory.
//
// The thread sanitizer takes each fiber for a thread of its own. Switching orders nothing, only what orders() says
// does: an access to memory without a barrier between is a race, in whichever order the fibers happened to run.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CUDA_ON_HOST_SANITIZED
#endif
#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifdef __SANITIZE_THREAD__
#define CUDA_ON_HOST_UNINSTRUMENTED __attribute__((no_sanitize("thread")))
#else
#define CUDA_ON_HOST_UNINSTRUMENTED
#endif

// Arithmetic on the model's own arrays: nothing for sanitizers to see, and worth vectors in every build.
#define CUDA_ON_HOST_FAST __attribute__((no_sanitize("thread", "address", "undefined"), optimize("O3")))

namespace cuda_on_host {

// A fiber as the sanitizers know it.
struct SanitizedFiber {
    void* fake_stack = nullptr;
    void* thread = nullptr;
};

inline void created(SanitizedFiber& fiber) {
#ifdef __SANITIZE_THREAD__
    fiber.thread = __tsan_create_fiber(0);
#else
    (void)fiber;
#endif
}

inline void before_switch(SanitizedFiber& from, SanitizedFiber& to, const void* stack, size_t bytes) {
    (void)from, (void)to, (void)stack, (void)bytes;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, stack, bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void after_switch(SanitizedFiber& self) {
    (void)self;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

// The stack and thread that the caller runs on.
inline void describe_caller(SanitizedFiber& fiber, void*& stack, size_t& bytes) {
    (void)fiber, (void)stack, (void)bytes;
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
#endif
#ifdef __SANITIZE_THREAD__
    fiber.thread = __tsan_get_current_fiber();
#endif
}

// What came before release(address) in a thread comes before what follows acquire(address) in another.
inline void release(void* address) {
    (void)address;
#ifdef __SANITIZE_THREAD__
    __tsan_release(address);
#endif
}

inline void acquire(void* address) {
    (void)address;
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(address);
#endif
}

// The model's own accesses are not the kernel's: the thread sanitizer does not see them while this lives...
class Unseen {
  public:
    Unseen() { begin(); }
    ~Unseen() { end(); }
    Unseen(const Unseen&) = delete;
    Unseen& operator=(const Unseen&) = delete;

    static void begin() {
#ifdef __SANITIZE_THREAD__
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
    }
    static void end() {
#ifdef __SANITIZE_THREAD__
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
    }
};

// ... except those that it makes for the kernel.
class Seen {
  public:
    Seen() { Unseen::end(); }
    ~Seen() { Unseen::begin(); }
    Seen(const Seen&) = delete;
    Seen& operator=(const Seen&) = delete;
};

// What happens while this lives is another thread's, to the thread sanitizer: a new one, ordered with the others by
// acquire() and release() only. The function that has it is CUDA_ON_HOST_UNINSTRUMENTED.
class Apart {
  public:
    CUDA_ON_HOST_UNINSTRUMENTED __attribute__((always_inline)) Apart() {
#ifdef __SANITIZE_THREAD__
        from_ = __tsan_get_current_fiber();
        self_ = __tsan_create_fiber(0);
        __tsan_switch_to_fiber(self_, __tsan_switch_to_fiber_no_sync);
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
    }
    CUDA_ON_HOST_UNINSTRUMENTED __attribute__((always_inline)) ~Apart() {
#ifdef __SANITIZE_THREAD__
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        __tsan_switch_to_fiber(from_, __tsan_switch_to_fiber_no_sync);
        __tsan_destroy_fiber(self_);
#endif
    }
    Apart(const Apart&) = delete;
    Apart& operator=(const Apart&) = delete;

#ifdef __SANITIZE_THREAD__
  private:
    void *from_, *self_;
#endif
};

inline void kernel_reads(const void* address, size_t bytes) {
    (void)address, (void)bytes;
#ifdef __SANITIZE_THREAD__
    const Seen seen;
    __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}

inline void kernel_writes(void* address, size_t bytes) {
    (void)address, (void)bytes;
#ifdef __SANITIZE_THREAD__
    const Seen seen;
    __tsan_write_range(address, bytes);
#endif
}

inline void poison(const void* address, size_t bytes) {
    (void)address, (void)bytes;
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(address, bytes);
#endif
}

inline void unpoison(const void* address, size_t bytes) {
    (void)address, (void)bytes;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
}

}  // namespace cuda_on_host
