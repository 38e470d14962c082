// Work that goes on beside the threads: boxes of TMA, products of warpgroups. When it happens is the setting Landing's.
#pragma once

#include <memory>
#include <string>

#include "machine.h"

namespace cuda_on_host {

class Operation {
  public:
    virtual ~Operation() = default;
    virtual bool ready() const = 0;    // whether it can happen now
    virtual bool awaited() const = 0;  // whether a thread sleeps until it has happened
    virtual void happen() = 0;         // once
    // What is wrong if it has not happened when all threads have returned; empty where it may happen after that.
    virtual std::string when_left() const = 0;
};

// Now under way. What the thread has done so far comes before it, to the thread sanitizer too.
void begin(std::shared_ptr<Operation> operation);

// Instructions call this: what is under way may happen, as Landing has it.
void let_operations_happen();

// No thread can run: one operation that some thread waits for happens. False where there is none.
bool make_operation_happen();

void finish_operations();  // all threads have returned; throws Fault
void forget_operations();

}  // namespace cuda_on_host
