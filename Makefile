# t6.c. `make` builds the CPU programs; `make help` lists the targets and what was found on this machine.
#
#   make CC=clang            another compiler; CXX, NVCC, CFLAGS and LDFLAGS work as usual
#   make BLAS=0              plain OpenMP loops instead of OpenBLAS
#   make MPI=0 NCCL=0        no MPI (one process only) and no NCCL, even where they are installed
#   make SANITIZE=1          address and undefined-behaviour sanitizers
#   make OUT=build/clang ... put the programs in another folder, so that variants live side by side
#   make train_t6cu ARCH="80 90a"   GPU code for these architectures (native: this machine's GPUs, the default)
#   make test_t6cu PRECISION=FP32   the GPU trainer in fp32, to check it
#   make WERROR=1            warnings are errors, as in the tests

# The project's own options count only on make's command line (a sub-make's included). Shells and HPC modules export
# ARCH, MPI and the like for other purposes.
OPTIONS := OUT ARCH MPI NCCL BLAS SANITIZE PRECISION WERROR
$(foreach v,$(OPTIONS),$(if $(filter environment%,$(origin $(v))),$(eval override undefine $(v))))

CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CXX := $(if $(filter default,$(origin CXX)),g++,$(CXX))
# Code for this machine's processor, by the first of these options that the compiler knows; a cross compiler has none.
compiles = $(shell echo 'int main(void) { return 0; }' | \
             $(CC) -Werror $(1) -x c -c -o /dev/null - >/dev/null 2>&1 && echo '$(1)')
ifeq ($(origin CFLAGS),undefined)
CFLAGS := -O3 $(or $(call compiles,-march=native),$(call compiles,-mcpu=native))
endif
LDFLAGS ?=
P := $(if $(OUT),$(OUT)/,)
# clang warns about every loop that it was asked to vectorise and did not
WARN := -Wall -Wextra $(if $(filter 1,$(WERROR)),-Werror) \
        $(if $(findstring clang,$(shell $(CC) --version 2>/dev/null)),-Wno-pass-failed)
# The commit that --version and the logs name; nothing where this folder is not the top of a git repository.
COMMIT := $(shell [ -z "$$(git rev-parse --show-prefix 2>/dev/null || echo none)" ] && \
                  git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)
COMMIT_FLAG := $(if $(COMMIT),-DT6_COMMIT='"$(COMMIT)"')
COMMON := $(CFLAGS) -std=gnu11 -fno-math-errno $(WARN) -I. -MMD -MP $(COMMIT_FLAG)

# A library counts as found when a program that uses it compiles and links.
links = $(shell printf '%s\n' '$(1)' 'int main(void) { return 0; }' | \
          $(CC) $(CFLAGS) -x c - -o /dev/null $(LDFLAGS) $(2) >/dev/null 2>&1 && echo yes)
HASH := \#
CC_WORKS := $(call links)
HAVE_CJSON := $(call links,$(HASH)include <cjson/cJSON.h>,-lcjson)
HAVE_XXHASH := $(call links,$(HASH)include <xxhash.h>)
HAVE_UTF8PROC := $(call links,$(HASH)include <utf8proc.h>,-lutf8proc)
HAVE_ZSTD := $(call links,$(HASH)include <zstd.h>,-lzstd)
HAVE_ZLIB := $(call links,$(HASH)include <zlib.h>,-lz)
HAVE_OPENBLAS := $(call links,$(HASH)include <cblas.h>,-lopenblas)
HAVE_OPENMP := $(call links,$(HASH)include <omp.h>,-fopenmp)
# mpicc says where mpi.h and libmpi are: --showme is Open MPI's option for it, -show is MPICH's.
MPICC_SAYS := $(shell mpicc --showme 2>/dev/null || mpicc -show 2>/dev/null)
MPI_FLAGS := $(filter -I%,$(MPICC_SAYS))
MPI_LIBS := $(filter -L% -l%,$(MPICC_SAYS))
HAVE_MPI := $(if $(MPICC_SAYS),$(call links,$(HASH)include <mpi.h>,$(MPI_FLAGS) $(MPI_LIBS)))

ifeq ($(SANITIZE),1)
COMMON += -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
BLAS_FLAGS :=
BLAS_LIBS :=
ifeq ($(if $(filter 0,$(BLAS)),,$(HAVE_OPENBLAS)),yes)
BLAS_FLAGS := -DUSE_OPENBLAS
BLAS_LIBS := -lopenblas
endif
COMM_FLAGS :=
COMM_LIBS :=
ifeq ($(if $(filter 0,$(MPI)),,$(HAVE_MPI)),yes)
COMM_FLAGS := -DUSE_MPI $(MPI_FLAGS)
COMM_LIBS := $(MPI_LIBS)
endif
# A checksum of the sources: the ranks of a run compare it, to be sure that they run the same program.
CODE := $(shell cat train_t6.* llmc/*.h llmc/*.cuh | cksum | cut -d ' ' -f 1)
COMM_FLAGS += -DT6_CODE='"$(CODE)"'

# CUDA: nvcc from the path or its usual place. The code is for this machine's GPUs; without one, for sm_80 and sm_90a.
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
OLDEST_ARCH := 80
NVCC_ARCHS = $(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
# nvidia-smi reports its errors on stdout too.
GPUS := $(shell found=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) && \
                printf '%s\n' "$$found" | tr -d ' \r' | grep -xE '[0-9]+[.][0-9]' | tr -d . | sort -nu)
GPU_ARCH := $(patsubst 90,90a,$(or $(shell for a in $(GPUS); do [ $$a -lt $(OLDEST_ARCH) ] || echo $$a; done),$(GPUS)))
ARCH ?= $(or $(GPU_ARCH),80 90a)
override ARCH := $(sort $(patsubst native,$(or $(GPU_ARCH),native),$(ARCH)))
# NVCC may be several words ("ccache nvcc -ccbin g++-12"), a link or a script: it says itself where its toolkit is.
TOOLKIT := $(if $(NVCC),$(shell $(NVCC) --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p'))
CUDA_PATHS := $(if $(TOOLKIT),-I$(TOOLKIT)/include -L$(TOOLKIT)/lib64 -L$(TOOLKIT)/lib)
HAVE_NCCL := $(if $(NVCC),$(call links,$(HASH)include <nccl.h>,$(CUDA_PATHS) -lnccl))
NCCL_FLAGS :=
NCCL_LIBS :=
ifeq ($(if $(filter 0,$(NCCL)),,$(HAVE_NCCL)),yes)
NCCL_FLAGS := -DUSE_NCCL
NCCL_LIBS := $(filter -L%,$(CUDA_PATHS)) -lnccl
endif
NVCC_FLAGS = -std=c++17 -O3 -I. --threads 0 $(foreach a,$(ARCH),-gencode=arch=compute_$(a),code=sm_$(a)) \
             $(COMMIT_FLAG) \
             $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) \
             $(if $(filter 1,$(WERROR)),-Werror all-warnings -Xcompiler -Werror) \
             -Xcompiler -Wall,-Wextra,-Wno-missing-field-initializers,-fopenmp -MMD -MP
# nvcc takes -L and -l itself; the rest of LDFLAGS goes to the compiler it links with, which wants commas escaped.
COMMA := ,
NVCC_LDFLAGS := $(filter -L% -l%,$(LDFLAGS)) \
                $(foreach f,$(filter-out -L% -l%,$(LDFLAGS)),-Xcompiler '$(subst $(COMMA),\$(COMMA),$(f))')
NVCC_LIBS := $(NVCC_LDFLAGS) -lcublasLt -lcjson -lgomp -lpthread
CUDA_BENCHES := $(patsubst dev/cuda/%.cu,build/%,$(wildcard dev/cuda/*.cu))

PROGRAMS := $(P)train_t6 $(P)generate_t6 $(P)eval_t6 $(P)data/tokenize $(P)data/toy_corpus
# Only the trainers run as several processes.
MODEL = $(COMMON) -fopenmp $(BLAS_FLAGS)
MODEL_LIBS := $(LDFLAGS) $(BLAS_LIBS) -lcjson -lm
TRAINER = $(MODEL) $(COMM_FLAGS)
TRAINER_LIBS := $(MODEL_LIBS) $(COMM_LIBS)
NVCC_TRAINER = $(NVCC_FLAGS) $(COMM_FLAGS) $(NCCL_FLAGS)
NVCC_TRAINER_LIBS := $(NVCC_LIBS) $(COMM_LIBS) $(NCCL_LIBS)

.PHONY: all help flags check-libraries headers test clean
.DELETE_ON_ERROR:

# Without make's own rules, which with OUT would build train_t6 from train_t6.c alone.
%: %.c
%: %.o
%.o: %.c

all: $(PROGRAMS)

help:
	@echo 'make                 the CPU programs: train_t6, generate_t6, eval_t6, data/tokenize, data/toy_corpus'
	@echo 'make train_t6        the CPU trainer (the reference)'
	@echo 'make generate_t6     the text generator, on the CPU'
	@echo 'make eval_t6         scores on the paper'"'"'s tasks, on the CPU'
	@echo 'make test_t6         gradient checks of train_t6.c: finite differences and golden vectors; run ./test_t6'
	@echo 'make test_units      tests of the headers in llmc/; run ./test_units'
	@echo 'make fuzz            fuzzers of the readers of files (clang): build/fuzz; test/test_fuzz.sh runs them'
	@echo 'make tokenize        from text to token shards: data/tokenize'
	@echo 'make toy_corpus      the generator of the toy corpus: data/toy_corpus'
	@echo 'make train_t6cu      the GPU trainer (CUDA 12 or 13)'
	@echo 'make generate_t6cu   the text generator, on the GPU'
	@echo 'make eval_t6cu       scores on the paper'"'"'s tasks, on the GPU'
	@echo 'make test_t6cu       checks of the GPU trainer against train_t6.c; run ./test_t6cu'
	@echo 'make test_decode     tests of the decoding kernels on an emulated GPU (CUDA Toolkit, no GPU); run ./test_decode'
	@echo 'make cuda_benches    microbenchmarks of the GPU operators: dev/cuda/X.cu becomes build/X'
	@echo 'make flags           regenerate doc/flags.md from the flag tables of the programs'
	@echo 'make test            all tests (scripts/test.sh)'
	@echo 'make headers         check that each header of llmc/ compiles alone'
	@echo 'make clean           remove what was built'
	@echo 'compiler: $(CC); OpenMP: $(or $(HAVE_OPENMP),NO), OpenBLAS: $(or $(HAVE_OPENBLAS),no),' \
	      'MPI: $(or $(HAVE_MPI),no), NCCL: $(or $(HAVE_NCCL),no), cJSON: $(or $(HAVE_CJSON),NO),' \
	      'xxHash: $(or $(HAVE_XXHASH),NO), utf8proc: $(or $(HAVE_UTF8PROC),NO), zstd: $(or $(HAVE_ZSTD),NO),' \
	      'zlib: $(or $(HAVE_ZLIB),NO)'
	@echo 'CUDA: $(or $(NVCC),no nvcc), code for $(foreach a,$(ARCH),sm_$(a)) ($(if $(GPU_ARCH),this GPU,no GPU here))'

MISSING := $(if $(HAVE_CJSON),,cJSON) $(if $(HAVE_XXHASH),,xxHash) $(if $(HAVE_UTF8PROC),,utf8proc) \
           $(if $(HAVE_ZSTD),,zstd) $(if $(HAVE_ZLIB),,zlib) $(if $(HAVE_OPENMP),,OpenMP)
OPENMP_HINT := $(if $(HAVE_OPENMP),,; OpenMP belongs to the compiler: clang needs libomp-dev (libomp elsewhere))
check-libraries:
	@$(if $(CC_WORKS),:,echo 'make: $(CC) does not build an empty program: check CC, CFLAGS and LDFLAGS' >&2; exit 1)
	@$(if $(strip $(MISSING)),\
	  echo 'make: missing for $(CC): $(strip $(MISSING)); run scripts/setup.sh$(OPENMP_HINT)' >&2; exit 1,:)
	@$(if $(BLAS_FLAGS),:,echo 'note: building without OpenBLAS: matrix products will be slow' >&2)

$(P)train_t6: train_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(TRAINER) $< -o $@ $(TRAINER_LIBS)

$(P)generate_t6: generate_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(MODEL) $< -o $@ $(MODEL_LIBS) -lutf8proc

$(P)eval_t6: eval_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(TRAINER) $< -o $@ $(TRAINER_LIBS) -lutf8proc

# test_t6.c is compiled twice: once with the trainer in double precision, for the finite differences and AdamW. That
# object keeps only the global symbols named here, so that the two copies link.
$(P)test_t6: test_t6.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(TRAINER) -DREAL=double -DDIFFERENCES -c $< -o $@.f64.o
	$(shell $(CC) -print-prog-name=objcopy) --keep-global-symbol=check_gradients_f64 \
	  --keep-global-symbol=golden_adamw_f64 $@.f64.o
	$(CC) $(TRAINER) $< $@.f64.o -o $@ $(TRAINER_LIBS)

$(P)test_units: test/test_units.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ $(LDFLAGS) -lcjson -lm -lpthread

# The fuzzers of the readers, with clang's libFuzzer, whatever CC is.
.PHONY: fuzz
FUZZ_CC := $(if $(findstring clang,$(CC)),$(CC),clang)
FUZZ_FLAGS := -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
fuzz: $(or $(OUT),build)/fuzz
$(or $(OUT),build)/fuzz: test/fuzz/fuzz.c Makefile | check-libraries
	@mkdir -p $(@D)
	@echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' | \
	  $(FUZZ_CC) $(FUZZ_FLAGS) -x c - -o $@ 2>/dev/null || { echo 'make: $(FUZZ_CC) has no libFuzzer, which' \
	  'fuzzing needs: install clang, and its compiler-rt (libclang-rt-dev) if that is a package of its own' >&2; exit 1; }
	$(FUZZ_CC) $(FUZZ_FLAGS) -std=gnu11 $(WARN) -I. -MMD -MP $< -o $@ $(LDFLAGS) -lzstd -lz -lutf8proc -lcjson -lm

$(P)data/tokenize: data/tokenize.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ $(LDFLAGS) -lzstd -lz -lutf8proc -lcjson -lpthread

$(P)data/toy_corpus: data/toy_corpus.c Makefile | check-libraries
	@mkdir -p $(@D)
	$(CC) $(COMMON) $< -o $@ $(LDFLAGS) -lcjson -lm

.PHONY: check-nvcc cuda_benches
# The architectures too: the first that cannot be built for is named.
check-nvcc: check-libraries
	@$(if $(NVCC),:,echo 'make: no nvcc found: install the CUDA Toolkit (12 or 13), or say where it is:' \
	  'make NVCC=/path/to/nvcc' >&2; exit 1)
	@for a in $(or $(ARCH),none); do \
	  n=$${a%[af]}; \
	  case $$n in \
	  native) echo 'make: ARCH=native: nvidia-smi finds no GPU here; name it instead, such as ARCH=89' ;; \
	  *[!0-9]*) echo "make: ARCH=$$a: not an architecture; it is numbers such as 80, 89 or 90a, or native" ;; \
	  *) [ $$n -ge $(OLDEST_ARCH) ] || \
	    echo "make: sm_$$a is too old: the oldest GPUs that can be used are sm_$(OLDEST_ARCH) (A100)"; \
	    case " $(NVCC_ARCHS) " in "  " | *" $$n "*) ;; \
	    *) echo "make: this nvcc has no sm_$$a, only $(strip $(NVCC_ARCHS)); install another CUDA Toolkit" ;; esac ;; \
	  esac; done | { ! grep -m 1 . >&2; }

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

$(P)eval_t6cu: eval_t6.cu Makefile | check-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_TRAINER) $< -o $@ $(NVCC_TRAINER_LIBS) -lutf8proc

# The decoding kernels on an emulated GPU. sed turns their declarations of shared memory into the emulator's.
EMULATED := $(addprefix build/emulated/,$(wildcard llmc/*.h llmc/*.cuh) test/testing.h \
              dev/cuda/bench.cuh dev/cuda/flashtpa_decode.cu)
build/emulated/%: %
	@mkdir -p $(@D)
	@sed -E -e 's/extern __shared__ __align__\([0-9]*\) (unsigned char) (\w+)\[\]/\1 *const \2 = gpu_dynamic_shared()/' \
	        -e 's/__shared__ (\w+) (\w+)((\[[^];]*\])*);/auto \&\2 = gpu_shared<\1\3, __COUNTER__>();/' $< >$@
$(P)test_decode $(P)test_decode_sm80: test/test_decode.cu test/emulated_gpu.h $(EMULATED) Makefile | check-nvcc
	@mkdir -p $(@D)
	$(CXX) -O1 -std=c++17 -fopenmp -fno-strict-aliasing -U_FORTIFY_SOURCE $(CUDA_PATHS) -Ibuild/emulated \
	  -DEMULATED_CC=$(if $(findstring sm80,$@),8,9) -include test/emulated_gpu.h -x c++ $< -o $@ $(LDFLAGS) -lcjson

cuda_benches: $(CUDA_BENCHES)
build/%: dev/cuda/%.cu Makefile | check-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_TRAINER) -Illmc $< -o $@ $(NVCC_TRAINER_LIBS)

ifeq ($(OUT),)
.PHONY: tokenize toy_corpus
tokenize: data/tokenize
toy_corpus: data/toy_corpus
endif

# The page of all flags. scripts/test.sh checks that it is what the programs print.
flags: $(PROGRAMS)
	@mkdir -p build doc
	scripts/flags.sh $(or $(OUT),.) >build/flags.md && mv build/flags.md doc/flags.md

# Each header compiles alone without a warning, as C and, since the CUDA programs include it, as C++.
# --threads and -o /dev/null together make nvcc 13.0 wait forever.
ALONE = $(NVCC) $(filter-out -MMD -MP --threads 0 -gencode=%,$(NVCC_TRAINER)) -arch=compute_$(lastword $(ARCH)) \
        -diag-suppress 177 -x cu -ptx
headers: | $(if $(NVCC),check-nvcc)
	@for h in llmc/*.h data/*.h test/testing.h test/golden.h; do \
	  $(CC) -std=gnu11 $(WARN) -I. -fsyntax-only -x c $$h && \
	  $(CXX) -std=c++17 $(WARN) -I. -fsyntax-only -x c++ $$h || exit 1; done
	@$(if $(NVCC),printf '%s\n' llmc/*.cuh | xargs -P $$(nproc) -I{} $(ALONE) {} -o /dev/null)
	@echo "headers: each compiles alone"

test:
	scripts/test.sh

clean:
	rm -rf build train_t6 generate_t6 eval_t6 test_t6 train_t6cu generate_t6cu eval_t6cu test_t6cu test_units \
	  test_decode test_decode_sm80 data/tokenize data/toy_corpus *.d *.o data/*.d

-include $(wildcard $(P)*.d $(P)data/*.d build/*.d)
