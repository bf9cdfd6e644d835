# t6.c in a container, built on top of scripts/setup.sh.
#   docker build -t t6 .                                              the CPU programs
#   docker build -t t6 --build-arg BASE=nvidia/cuda:12.9.1-devel-ubuntu24.04 .      and the GPU programs
#   docker run --rm -it t6 scripts/quickstart.sh
#   docker run --rm -it --gpus all --ipc host -v "$PWD/data/mine:/t6.c/data/mine" -v "$PWD/out:/t6.c/out" t6
# Further build arguments: ARCH="90a" is the GPU code (default: what make builds on a machine without a GPU).
# CFLAGS is for the CPU code; the default runs on other CPUs than the one that built it: on x86-64 those with AVX2.
ARG BASE=debian:12
FROM ${BASE}
WORKDIR /t6.c

# What is installed depends on this script only, so an edited source does not install anew.
COPY scripts/setup.sh scripts/
RUN scripts/setup.sh mpi && rm -rf /var/lib/apt/lists/*

# Only sources: no programs built for this machine, no shards, no runs.
COPY Makefile LICENSE *.md *.c *.cu *.h ./
COPY llmc llmc/
COPY data/*.c data/*.h data/*.sh data/*.md data/
COPY scripts scripts/
COPY test test/
COPY dev dev/
COPY doc doc/

ARG ARCH=
ARG CFLAGS=
RUN [ "$(uname -m)" = x86_64 ] && march="-march=x86-64-v3"; \
    gpu=$(command -v nvcc >/dev/null && echo train_t6cu generate_t6cu); \
    make -j"$(nproc)" CFLAGS="${CFLAGS:--O3 $march}" ${ARCH:+ARCH="$ARCH"} all $gpu

# Open MPI refuses to run as root otherwise.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
CMD ["bash"]
