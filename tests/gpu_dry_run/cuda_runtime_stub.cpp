// The functions of the CUDA runtime that the planner refers to, as a Hopper GPU would answer.

#include <algorithm>
#include <cstddef>

extern "C" {

int registers_per_thread = 0;  // of the kernel whose occupancy is asked for

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:  // cudaDevAttrMultiProcessorCount
      *value = 132;
      return 0;
    case 75:  // cudaDevAttrComputeCapabilityMajor
      *value = 9;
      return 0;
    case 76:  // cudaDevAttrComputeCapabilityMinor
      *value = 0;
      return 0;
    case 81:  // cudaDevAttrMaxSharedMemoryPerMultiprocessor
      *value = 233472;
      return 0;
    case 97:  // cudaDevAttrMaxSharedMemoryPerBlockOptin
      *value = 232448;
      return 0;
    default:
      return 1;  // cudaErrorInvalidValue
  }
}

// As NVIDIA's occupancy calculator has it for compute capability 9.0: 64 warps and 65,536 registers,
// which warps take by 256 and in groups of four; 1 KiB of shared memory per program is CUDA's own.
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num_blocks, const void*,
                                                           int num_threads, size_t shared_bytes,
                                                           unsigned) {
  int warps = (num_threads + 31) / 32, of_a_warp = (registers_per_thread * 32 + 255) / 256 * 256;
  int by_registers = 65536 / of_a_warp / 4 * 4 / warps;
  int by_memory = 233472 / ((static_cast<int>(shared_bytes) + 127) / 128 * 128 + 1024);
  *num_blocks = std::min({32, 64 / warps, by_registers, by_memory});
  return 0;
}

// The plan stays in the pinned buffer: there is no device to copy it to.
int cudaMemcpyAsync(void*, const void*, size_t, int, void*) { return 0; }

const char* cudaGetErrorString(int) { return "an error of the stub"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}

// The launcher of the kernel refers to these (in CUDA 12, and in 13), and nobody calls it.
int cudaLaunchKernel() { return 1; }
int __cudaPopCallConfiguration() { return 1; }
int __cudaGetKernel() { return 1; }
int __cudaLaunchKernel() { return 1; }
}
