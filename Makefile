# t6.c. `make` builds the CPU programs; `make help` lists the targets and what was found on this machine.
#
#   make CC=clang            another compiler
#   make BLAS=0              plain OpenMP loops instead of OpenBLAS
#   make MPI=0 NCCL=0        one process only, though there is an MPI; GPUs without NCCL
#   make SANITIZE=1          address and undefined-behaviour sanitizers
#   make OUT=build/clang ... put the programs in another folder, so that variants live side by side
#   make train_t6cu ARCH="80 90a"   GPU code for these architectures instead of this machine's GPU
#   make test_t6cu PRECISION=FP32   the GPU trainer in fp32, to check it

CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CFLAGS ?= -O3 -march=native
P := $(if $(OUT),$(OUT)/,)
# clang warns of loops that it does not vectorise though asked to; that is no fault of theirs
WARN := -Wall -Wextra -Werror -Wno-pass-failed
COMMON := $(CFLAGS) -std=gnu11 -fno-math-errno $(WARN) -I. -MMD -MP

# A library is there when a program that uses it links; a path guess is not enough.
links = $(shell printf '%s\n' '$(1)' 'int main(void) { return 0; }' | $(CC) -Werror -x c - -o /dev/null $(2) >/dev/null 2>&1 && echo yes)
HASH := \#
HAVE_CJSON := $(call links,$(HASH)include <cjson/cJSON.h>,-lcjson)
HAVE_XXHASH := $(call links,$(HASH)include <xxhash.h>)
HAVE_UTF8PROC := $(call links,$(HASH)include <utf8proc.h>,-lutf8proc)
HAVE_ZSTD := $(call links,$(HASH)include <zstd.h>,-lzstd)
HAVE_OPENBLAS := $(call links,$(HASH)include <cblas.h>,-lopenblas)
HAVE_OPENMP := $(call links,$(HASH)include <omp.h>,-fopenmp)
# Where mpi.h and libmpi are, mpicc knows (Open MPI's first, then MPICH's way of asking).
MPICC_SAYS := $(shell mpicc --showme 2>/dev/null || mpicc -show 2>/dev/null)
MPI_FLAGS := $(filter -I%,$(MPICC_SAYS))
MPI_LIBS := $(filter -L% -l%,$(MPICC_SAYS))
HAVE_MPI := $(if $(MPICC_SAYS),$(call links,$(HASH)include <mpi.h>,$(MPI_FLAGS) $(MPI_LIBS)))

ifeq ($(SANITIZE),1)
COMMON += -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
ifeq ($(if $(filter 0,$(BLAS)),,$(HAVE_OPENBLAS)),yes)
BLAS_FLAGS := -DUSE_OPENBLAS
BLAS_LIBS := -lopenblas
endif
ifeq ($(if $(filter 0,$(MPI)),,$(HAVE_MPI)),yes)
COMM_FLAGS := -DUSE_MPI $(MPI_FLAGS)
COMM_LIBS := $(MPI_LIBS)
endif
# What the ranks of a run compare, so that they are one program: a checksum of the sources.
CODE := $(shell cat train_t6.c train_t6.cu llmc/*.h llmc/*.cuh | cksum | cut -d ' ' -f 1)
COMM_FLAGS += -DT6_CODE='"$(CODE)"'

# CUDA: nvcc from the path or its usual place; code for the GPU that is here, else for sm_80 and sm_90a.
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
GPU_ARCH := $(patsubst 90,90a,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .))
ARCH ?= $(or $(GPU_ARCH),80 90a)
CUDA_PATHS := $(if $(NVCC),-I$(dir $(NVCC))../include -L$(dir $(NVCC))../lib64 -L$(dir $(NVCC))../lib)
HAVE_NCCL := $(if $(NVCC),$(call links,$(HASH)include <nccl.h>,$(CUDA_PATHS) -lnccl))
ifeq ($(if $(filter 0,$(NCCL)),,$(HAVE_NCCL)),yes)
NCCL_FLAGS := -DUSE_NCCL
NCCL_LIBS := $(filter -L%,$(CUDA_PATHS)) -lnccl
endif
NVCC_FLAGS = -std=c++17 -O3 -I. $(foreach a,$(sort $(ARCH)),-gencode=arch=compute_$(a),code=sm_$(a)) $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) \
             -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror,-fopenmp -MMD -MP
NVCC_LIBS := -lcublasLt -lcjson -lgomp
CUDA_BENCHES := $(patsubst dev/cuda/%.cu,build/%,$(wildcard dev/cuda/*.cu))

PROGRAMS := $(P)train_t6 $(P)generate_t6 $(P)data/tokenize $(P)data/toy_corpus
# Only the trainers are several processes.
MODEL = $(COMMON) -fopenmp $(BLAS_FLAGS)
MODEL_LIBS := $(BLAS_LIBS) -lcjson -lm
TRAINER = $(MODEL) $(COMM_FLAGS)
TRAINER_LIBS := $(MODEL_LIBS) $(COMM_LIBS)
NVCC_TRAINER = $(NVCC_FLAGS) $(COMM_FLAGS) $(NCCL_FLAGS)
NVCC_TRAINER_LIBS := $(NVCC_LIBS) $(COMM_LIBS) $(NCCL_LIBS)

.PHONY: all help check-libraries headers test clean
.DELETE_ON_ERROR:

all: $(PROGRAMS)

help:
	@echo 'make                 the CPU programs: train_t6, generate_t6, data/tokenize, data/toy_corpus'
	@echo 'make train_t6        the CPU trainer (the reference)'
	@echo 'make generate_t6     text from a checkpoint, on the CPU'
	@echo 'make test_t6         its gradient checks: finite differences and golden vectors; run ./test_t6'
	@echo 'make test_units      tests of the headers in llmc/'
	@echo 'make tokenize        text to token shards: data/tokenize'
	@echo 'make toy_corpus      the generator of the toy corpus: data/toy_corpus'
	@echo 'make train_t6cu      the GPU trainer (CUDA 12 or 13)'
	@echo 'make generate_t6cu   text from a checkpoint, on the GPU'
	@echo 'make test_t6cu       the GPU trainer against train_t6.c; run ./test_t6cu'
	@echo 'make test_decode     the decoding kernels on an emulated GPU, which needs nvcc'"'"'s headers but no GPU; run ./test_decode'
	@echo 'make cuda_benches    microbenchmarks of the GPU operators, dev/cuda/X.cu to build/X'
	@echo 'make test            every test there is (scripts/test.sh)'
	@echo 'make headers         each header of llmc/ compiles alone'
	@echo 'make clean           remove what was built'
	@echo 'compiler $(CC); OpenMP: $(or $(HAVE_OPENMP),NO), OpenBLAS: $(or $(HAVE_OPENBLAS),no), MPI: $(or $(HAVE_MPI),no), NCCL: $(or $(HAVE_NCCL),no), cJSON: $(or $(HAVE_CJSON),NO),' \
	      'xxHash: $(or $(HAVE_XXHASH),NO), utf8proc: $(or $(HAVE_UTF8PROC),NO), zstd: $(or $(HAVE_ZSTD),NO)'
	@echo 'CUDA: $(or $(NVCC),no nvcc), code for $(foreach a,$(ARCH),sm_$(a)) ($(if $(GPU_ARCH),the GPU here,no GPU here))'

check-libraries:
	@$(if $(and $(HAVE_CJSON),$(HAVE_XXHASH),$(HAVE_UTF8PROC),$(HAVE_ZSTD),$(HAVE_OPENMP)),:,\
	  echo 'A library is missing (make help says which): run scripts/setup.sh' >&2; exit 1)
	@$(if $(BLAS_FLAGS),:,echo 'note: building without OpenBLAS; matrix products are plain loops, and slow' >&2)

$(P)train_t6: train_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(TRAINER) $< -o $@ $(TRAINER_LIBS)

$(P)generate_t6: generate_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(MODEL) $< -o $@ $(MODEL_LIBS) -lutf8proc

# test_t6.c is compiled twice, the second time with the trainer in double precision for the finite differences; of that object
# only one function stays visible.
$(P)test_t6: test_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(TRAINER) -DREAL=double -DDIFFERENCES -c $< -o $@.f64.o
	objcopy --keep-global-symbol=check_gradients_f64 $@.f64.o
	$(CC) $(TRAINER) $< $@.f64.o -o $@ $(TRAINER_LIBS)

$(P)test_units: test/test_units.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ -lcjson -lm

$(P)data/tokenize: data/tokenize.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ -lzstd -lutf8proc -lcjson -lpthread

$(P)data/toy_corpus: data/toy_corpus.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ -lcjson -lm

.PHONY: check-nvcc cuda_benches
check-nvcc: check-libraries
	@$(if $(NVCC),:,echo 'There is no nvcc: install the CUDA Toolkit (12 or 13), or say where it is: make NVCC=/path/to/nvcc' >&2; exit 1)

$(P)train_t6cu: train_t6.cu Makefile | check-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_TRAINER) $< -o $@ $(NVCC_TRAINER_LIBS)

# The reference that test_t6.cu checks against: train_t6.c as an object without its main.
$(P)test_t6cu: test_t6.cu train_t6.c Makefile | check-nvcc
	@mkdir -p $(@D)
	$(CC) $(TRAINER) -DT6_NO_MAIN -c train_t6.c -o $@.ref.o
	$(NVCC) $(NVCC_TRAINER) $< $@.ref.o -o $@ $(NVCC_TRAINER_LIBS) $(BLAS_LIBS) -lutf8proc

$(P)generate_t6cu: generate_t6.cu Makefile | check-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(NVCC_LIBS) -lutf8proc

# The decoding kernels on an emulated GPU, which wants shared memory declared in its own way.
EMULATED := $(addprefix build/emulated/,$(wildcard llmc/*.h llmc/*.cuh) dev/cuda/bench.cuh dev/cuda/flashtpa_decode.cu)
build/emulated/%: %
	@mkdir -p $(@D)
	@sed -E -e 's/extern __shared__ __align__\([0-9]*\) unsigned char (\w+)\[\]/unsigned char *const \1 = gpu_dynamic_shared()/' \
	        -e 's/__shared__ (\w+) (\w+)((\[[^];]*\])*);/auto \&\2 = gpu_shared<\1\3, __COUNTER__>();/' $< >$@
$(P)test_decode $(P)test_decode_sm80: test/test_decode.cu test/emulated_gpu.h $(EMULATED) Makefile | check-nvcc
	@mkdir -p $(@D)
	g++ -O1 -std=c++17 -fopenmp -fno-strict-aliasing -U_FORTIFY_SOURCE -DEMULATED_CC=$(if $(findstring sm80,$@),8,9) $(CUDA_PATHS) -Ibuild/emulated \
	  -include test/emulated_gpu.h -x c++ $< -o $@ -lcjson

cuda_benches: $(CUDA_BENCHES)
build/%: dev/cuda/%.cu Makefile | check-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_TRAINER) -Illmc $< -o $@ $(NVCC_TRAINER_LIBS)

ifeq ($(OUT),)
.PHONY: tokenize toy_corpus
tokenize: data/tokenize
toy_corpus: data/toy_corpus
endif

# Each header compiles alone, as C and as C++ (the CUDA programs include them), without a warning.
headers:
	@for h in llmc/*.h; do \
	  $(CC) -std=gnu11 $(WARN) -I. -fsyntax-only -x c $$h && g++ -std=c++17 $(WARN) -I. -fsyntax-only -x c++ $$h || exit 1; done
	@$(if $(NVCC),printf '%s\n' llmc/*.cuh | xargs -P $$(nproc) -I{} \
	  $(NVCC) $(filter-out -MMD -MP -gencode=%,$(NVCC_TRAINER)) -arch=compute_$(lastword $(ARCH)) -diag-suppress 177 -x cu -ptx {} -o /dev/null)
	@echo "headers: each compiles alone"

test:
	scripts/test.sh

clean:
	rm -rf build train_t6 generate_t6 test_t6 train_t6cu generate_t6cu test_t6cu test_units test_decode test_decode_sm80 data/tokenize data/toy_corpus *.d *.o data/*.d

-include $(wildcard $(P)*.d $(P)data/*.d build/*.d)
