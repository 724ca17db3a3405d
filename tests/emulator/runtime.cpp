// CUDA's run time on a CPU, in one thread: blocks one after another; in a block, warps one after another, each as far as
// it gets without the others. A thread of a kernel is a fiber, a stack of its own that the scheduler switches to and that
// switches back where it has to wait. What a GPU would answer with a hang, a crash or a wrong number is an error of the
// launch here, which says which kernel, where and why.
//
// Environment:
//   ELBO_EMULATOR_ORDER            of blocks, warps and threads: forward (if unset), reverse or shuffled
//   ELBO_EMULATOR_SEED             of what is shuffled: a number
//   ELBO_EMULATOR_MULTIPROCESSORS  how many the device has: 2 if unset
#include <cuda_runtime.h>

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(ELBO_EMULATOR_SANITIZED)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace emulator {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = size_t{1} << 18;

// ---- fibers ----

// Where a fiber, or the scheduler, goes on once it is switched to.
struct Stack {
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  void* memory = nullptr;  // its lowest address
  size_t bytes = 0;
};

#if defined(__x86_64__)
// Leaves the registers that a function must keep on one stack, and takes those of the other.
extern "C" void elbo_emulator_switch(void** from, void* to);
asm(R"(
.text
.type elbo_emulator_switch, @function
elbo_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size elbo_emulator_switch, .-elbo_emulator_switch
)");
#endif

enum State { kReady, kAtBarrier, kAtShuffle, kEnded };

struct Thread {
  Stack stack;
  State state = kEnded;
  Place at{};     // where it waits
  double number;  // what it gives to a shuffle, and then takes
  int lanes;      // of the shuffle
};

Thread threads[kMostThreads];
Stack scheduler;
int running;  // the number of the thread that runs

void (*body)(void*);
void* body_argument;

void switch_stacks(Stack& from, Stack& to) {
#if defined(ELBO_EMULATOR_SANITIZED)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.memory, to.bytes);
#endif
#if defined(__x86_64__)
  elbo_emulator_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(ELBO_EMULATOR_SANITIZED)
  const void* memory;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &memory, &bytes);
  if (scheduler.memory == nullptr) scheduler.memory = const_cast<void*>(memory), scheduler.bytes = bytes;
#endif
}

void back_to_scheduler() { switch_stacks(threads[running].stack, scheduler); }

// What a fiber does: a thread of a kernel, and then it waits for the next one.
void fiber() {
#if defined(ELBO_EMULATOR_SANITIZED)
  const void* memory;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &memory, &bytes);
  if (scheduler.memory == nullptr) scheduler.memory = const_cast<void*>(memory), scheduler.bytes = bytes;
#endif
  for (;;) {
    body(body_argument);
    threads[running].state = kEnded;
    back_to_scheduler();
  }
}

// A fresh start for a thread, also for one that was left in the middle of a kernel that failed.
void make_fiber(Stack& stack) {
  if (stack.memory == nullptr) {
    stack.bytes = kStackBytes;
    stack.memory = mmap(nullptr, stack.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack.memory == MAP_FAILED) std::perror("the emulator's stacks"), std::abort();
    mprotect(stack.memory, 4096, PROT_NONE);  // a stack that is too small is a crash, not another stack's numbers
  }
#if defined(ELBO_EMULATOR_SANITIZED)
  __asan_unpoison_memory_region(stack.memory, stack.bytes);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack.memory) + stack.bytes);
  *--top = nullptr;  // so that `fiber` finds the stack as aligned as a call would leave it
  *--top = reinterpret_cast<void*>(fiber);
  stack.top = top - 6;  // registers
#else
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.memory;
  stack.context.uc_stack.ss_size = stack.bytes;
  makecontext(&stack.context, fiber, 0);
#endif
}

// ---- errors ----

std::string error;
void* kernel;
int64_t launches = 0;

// The kernel's name, which the dynamic linker does not know of a function that is not exported.
std::string name_of_kernel() {
  Dl_info library;
  if (dladdr(kernel, &library) == 0) return "a kernel";
  char line[4096];
  std::string found = "a kernel";
  const std::string command = "nm --defined-only '" + std::string(library.dli_fname) + "' 2> /dev/null";
  FILE* const symbols = popen(command.c_str(), "r");
  if (symbols == nullptr) return found;
  while (std::fgets(line, sizeof line, symbols) != nullptr) {
    unsigned long address;
    char kind, name[4096];
    if (std::sscanf(line, "%lx %c %4095s", &address, &kind, name) != 3) continue;
    if (address != static_cast<unsigned long>(static_cast<char*>(kernel) - static_cast<char*>(library.dli_fbase))) continue;
    int status;
    char* const readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    found = status == 0 ? readable : name;
    std::free(readable);
  }
  pclose(symbols);
  for (const char* noise : {"elbo_ext::", "(anonymous namespace)::", "void "})
    for (size_t at; (at = found.find(noise)) != std::string::npos;) found.erase(at, std::string(noise).size());
  return found.substr(0, found.rfind('('));
}

std::string text_of(Place at) {
  const std::string path = at.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line);
}

std::string text_of(int thread) {
  static const char* const states[] = {"runs", "waits at the barrier ", "waits at the shuffle ", "has ended"};
  const Thread& t = threads[thread];
  return "thread " + std::to_string(thread) + " " + states[t.state] + (t.state == kEnded ? "" : text_of(t.at));
}

void fail(const std::string& what, const std::string& block = "") {
  error = "the emulator stopped " + name_of_kernel() + block + ": " + what;
  std::fprintf(stderr, "%s\n", error.c_str());
}

std::string this_block() {
  return " in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
}

// ---- the order ----

enum Order { kForward, kReverse, kShuffled };

std::string setting(const char* name, const char* unset) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 ? unset : value;
}

Order order_of_environment() {
  const std::string name = setting("ELBO_EMULATOR_ORDER", "forward");
  if (name == "forward") return kForward;
  if (name == "reverse") return kReverse;
  if (name == "shuffled") return kShuffled;
  std::fprintf(stderr, "ELBO_EMULATOR_ORDER must be forward, reverse or shuffled, got '%s'.\n", name.c_str());
  std::exit(2);
}

const Order order = order_of_environment();
std::mt19937 random_numbers(static_cast<unsigned>(std::stoul(setting("ELBO_EMULATOR_SEED", "0"))));

int random_below(size_t count) { return static_cast<int>(random_numbers() % count); }

// The numbers below a count in the order in which they take their turns.
template <class Number>
void put_in_order(std::vector<Number>& numbers, size_t count) {
  numbers.resize(count);
  std::iota(numbers.begin(), numbers.end(), Number(0));
  if (order == kReverse) std::reverse(numbers.begin(), numbers.end());
  for (size_t i = count; order == kShuffled && i > 1; --i) std::swap(numbers[i - 1], numbers[random_below(i)]);
}

// ---- a block ----

int block_threads;

// Lets each thread of a warp that is ready run until it waits or ends. False: a thread made an error.
bool step(int warp) {
  const int first = warp * kWarp;
  static std::vector<int> lanes;
  put_in_order(lanes, std::min(kWarp, block_threads - first));
  for (int lane : lanes) {
    if (threads[first + lane].state != kReady) continue;
    running = first + lane;
    threadIdx = {static_cast<unsigned>(running), 0, 0};
    switch_stacks(scheduler, threads[running].stack);
    if (!error.empty()) return false;
  }
  return true;
}

// Once all threads of a warp wait or have ended: true if some wait at a shuffle, which is then done.
bool shuffle(int warp) {
  const int first = warp * kWarp, end = std::min(first + kWarp, block_threads);
  int waiting = -1, other = -1;
  for (int i = first; i < end; ++i) {
    if (threads[i].state == kAtShuffle && waiting < 0) waiting = i;
    if (threads[i].state != kAtShuffle) other = i;
  }
  if (waiting < 0) return false;
  const Thread& one = threads[waiting];
  for (int i = first; i < end && other < 0; ++i)
    if (threads[i].at.line != one.at.line || threads[i].at.file != one.at.file || threads[i].lanes != one.lanes) other = i;
  if (other >= 0) return fail(text_of(waiting) + ", but " + text_of(other), this_block()), false;
  if (end - first != kWarp) return fail(text_of(waiting) + ", but its warp is not whole", this_block()), false;
  double numbers[kWarp];
  for (int i = 0; i < kWarp; ++i) numbers[i] = threads[first + i].number;
  for (int i = 0; i < kWarp; ++i) {
    threads[first + i].number = numbers[i ^ one.lanes];
    threads[first + i].state = kReady;
  }
  return true;
}

// Once no warp gets any further: true if all threads wait at one barrier, which then opens.
bool barrier_opens() {
  int waiting = -1, other = -1;
  for (int i = 0; i < block_threads; ++i)
    if (threads[i].state == kAtBarrier) waiting = i;
  if (waiting < 0) return false;
  const Place at = threads[waiting].at;
  for (int i = 0; i < block_threads; ++i)
    if (threads[i].state != kAtBarrier || threads[i].at.line != at.line || threads[i].at.file != at.file) other = i;
  if (other >= 0) return fail(text_of(waiting) + ", but " + text_of(other), this_block()), false;
  for (int i = 0; i < block_threads; ++i) threads[i].state = kReady;
  return true;
}

#if !defined(ELBO_EMULATOR_SANITIZED)
// Shared memory is all that this library has of thread_local variables, but for one, which brings them into being.
thread_local volatile char any_of_them;

int fill_shared_memory(dl_phdr_info* library, size_t, void*) {
  Dl_info own;
  if (dladdr(reinterpret_cast<void*>(&fill_shared_memory), &own) == 0 ||
      reinterpret_cast<ElfW(Addr)>(own.dli_fbase) != library->dlpi_addr)
    return 0;
  for (int i = 0; i < library->dlpi_phnum; ++i)
    if (library->dlpi_phdr[i].p_type == PT_TLS && library->dlpi_tls_data != nullptr)
      std::memset(library->dlpi_tls_data, 0xFF, library->dlpi_phdr[i].p_memsz);
  return 1;
}
#endif

bool run_block() {
#if !defined(ELBO_EMULATOR_SANITIZED)
  any_of_them = 0;
  dl_iterate_phdr(fill_shared_memory, nullptr);
#endif
  for (int i = 0; i < block_threads; ++i) threads[i].state = kReady;
  const int warps = (block_threads + kWarp - 1) / kWarp;
  static std::vector<int> turns;
  do {
    // Shuffled, a warp pauses at each shuffle for others; else it goes on as far as it gets.
    put_in_order(turns, warps);
    while (!turns.empty()) {
      const int turn = order == kShuffled ? random_below(turns.size()) : 0, warp = turns[turn];
      if (!step(warp)) return false;
      const bool goes_on = shuffle(warp);
      if (!error.empty()) return false;
      if (!goes_on) turns.erase(turns.begin() + turn);
    }
  } while (barrier_opens());
  return error.empty();
}

}  // namespace

// ---- what a kernel calls ----

void barrier(Place at) {
  threads[running].state = kAtBarrier;
  threads[running].at = at;
  back_to_scheduler();
}

double shuffle_xor(double number, int lanes, Place at) {
  Thread& own = threads[running];
  own.state = kAtShuffle;
  own.at = at;
  own.number = number;
  own.lanes = lanes;
  back_to_scheduler();
  return own.number;
}

void fail_access(const void* address, size_t bytes, Place at) {
  char text[64];
  std::snprintf(text, sizeof text, "%zu bytes at %p, which is not aligned", bytes, address);
  fail("thread " + std::to_string(running) + " accesses " + text + " (" + text_of(at) + ")", this_block());
  for (;;) back_to_scheduler();  // which drops the block
}

cudaError_t launch(dim3 grid, dim3 block, void* of, void (*thread)(void*), void* call) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  kernel = of;
  error.clear();
  const unsigned count = block.x;
  if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || count == 0 ||
      count > kMostThreads || block.y != 1 || block.z != 1) {
    fail("there is no grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
         ") blocks of (" + std::to_string(count) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) +
         ") threads");
    return cudaErrorInvalidConfiguration;
  }
  static unsigned made = 0;
  for (; made < count; ++made) make_fiber(threads[made].stack);
  body = thread;
  body_argument = call;
  block_threads = static_cast<int>(count);
  gridDim = grid;
  blockDim = block;
  static std::vector<uint64_t> blocks;
  put_in_order(blocks, uint64_t{grid.x} * grid.y);
  for (uint64_t number : blocks) {
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x), 0};
    if (run_block()) continue;
    for (unsigned i = 0; i < count; ++i) make_fiber(threads[i].stack);
    return cudaErrorLaunchFailure;
  }
  ++launches;
  return cudaSuccess;
}

}  // namespace emulator

// ---- what the host calls ----

namespace {
int current_device = 0;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = std::stoi(emulator::setting("ELBO_EMULATOR_MULTIPROCESSORS", "2"));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
// No driver, as on a machine without a GPU.
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return emulator::error.c_str(); }

// For the tests: how many kernels have run.
extern "C" __attribute__((visibility("default"))) int64_t elbo_emulator_launches() { return emulator::launches; }
