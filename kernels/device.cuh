// What all kernels share; it is pasted in front of each of them. No kernel file includes anything.
//
// Every multiply-add is written out as fmaf: devices are compiled with --fmad=false, so that the
// bits are those of the contract (kernels/__init__.py) on any of them. Collectives of a warp take
// its full mask, so whoever calls them first makes sure that all lanes get there.

#define FP_FULL_MASK 0xffffffffu
