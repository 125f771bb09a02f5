/* A libcuda without a GPU: the functions that Triton calls to load and launch a cubin.

   They run nothing. stub_last has the arguments of the last launch. */

#include <elf.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define MAX_FUNCTIONS 4096

struct {
  uint32_t launches, grid[3], block[3], shared;
  uint32_t params;      /* parameters that the cubin declares */
  uint64_t values[256]; /* the first 8 bytes of each */
  char name[256];
} stub_last;

static struct {
  char name[256];
  int params;
} functions[MAX_FUNCTIONS];
static int count;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) { /* of an H200 */
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1 << 16;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                      const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = "stub", CUDA_SUCCESS;
}

/* A module is the number of its kernel's parameters: .nv.info has a record of each. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static const char record[] = {4, 0x17, 12, 0, 0, 0, 0, 0}; /* EIATTR_KPARAM_INFO, 12 bytes */
  const Elf64_Ehdr *header = image;
  size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  intptr_t params = 0;
  for (const char *at = image; at + sizeof record <= (const char *)image + size; at += 4)
    params += !memcmp(at, record, sizeof record);
  *module = (CUmodule)params;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (count + 1 == MAX_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(functions[++count].name, name, sizeof functions->name - 1);
  functions[count].params = (int)(intptr_t)module;
  *function = (CUfunction)(intptr_t)count;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params,
                          void **extra) {
  int at = (int)(intptr_t)function;
  memcpy(stub_last.grid, &config->gridDimX, sizeof stub_last.grid);
  memcpy(stub_last.block, &config->blockDimX, sizeof stub_last.block);
  stub_last.shared = config->sharedMemBytes;
  stub_last.params = functions[at].params;
  memcpy(stub_last.name, functions[at].name, sizeof stub_last.name);
  for (int i = 0; i < functions[at].params; i++)
    memcpy(&stub_last.values[i], params[i], sizeof *stub_last.values);
  stub_last.launches++;
  return CUDA_SUCCESS;
}
