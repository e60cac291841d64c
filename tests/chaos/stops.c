/* Preloaded into a process: the n-th call that changes something in a folder is the last one.

   A call is counted if its path, or the file of its descriptor, lies in the folder. What happens at
   the n-th one: `kill` ends the process before the call; `half` lets a write store half of its bytes
   before; `full` lets this call and all later ones fail as on a full disk, a write after half of its
   bytes; `readonly` lets them fail as on a disk that is mounted read-only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, KILL, HALF, FULL, READONLY };
static char folder[4096];
static int act = NOTHING;
static long at = 0, count = 0;

void chaos_arm(const char *path, int what, long n) {
    snprintf(folder, sizeof folder, "%s", path);
    act = what, at = n, count = 0;
}

long chaos_count(void) { return count; }

static int is_in(const char *path) {
    return path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_fd_in(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_in(path);
}

static int is_at(int dirfd, const char *path) {
    return path && path[0] != '/' && dirfd != AT_FDCWD ? is_fd_in(dirfd) : is_in(path);
}

/* Returns whether the call must fail, after half of it if it is a write. */
static int stops(int is_concerned, int is_write) {
    if (act == NOTHING || !is_concerned) return 0;
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (now < at) return 0;
    if (act == KILL || (act == HALF && !is_write)) kill(getpid(), SIGKILL), pause();
    if (act == HALF) return 1;
    errno = act == FULL ? ENOSPC : EROFS;
    return 1;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAILED (errno = act == READONLY ? EROFS : ENOSPC, -1)

/* A full disk takes half of the first write; the next one fails. */
#define WRITE(name, params, concerned, whole, half)                                               \
    ssize_t name params {                                                                          \
        NEXT(name);                                                                                \
        if (!stops(concerned, 1)) return whole;                                                    \
        if (act == HALF) { half; kill(getpid(), SIGKILL), pause(); }                               \
        if (act == FULL && count == at && n > 1) return half;                                      \
        return FAILED;                                                                             \
    }
WRITE(write, (int fd, const void *p, size_t n), is_fd_in(fd), next(fd, p, n), next(fd, p, n / 2))
WRITE(pwrite, (int fd, const void *p, size_t n, off_t o), is_fd_in(fd), next(fd, p, n, o),
      next(fd, p, n / 2, o))
WRITE(pwrite64, (int fd, const void *p, size_t n, off64_t o), is_fd_in(fd), next(fd, p, n, o),
      next(fd, p, n / 2, o))

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags, last)                                                                          \
    va_list rest;                                                                                  \
    va_start(rest, last);                                                                          \
    mode_t mode = (flags) & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                    \
    va_end(rest)
#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        NEXT(name);                                                                                \
        MODE(flags, flags);                                                                        \
        return stops(CHANGES(flags) && is_in(path), 0) ? FAILED : next(path, flags, mode);         \
    }
#define OPENAT(name)                                                                               \
    int name(int dir, const char *path, int flags, ...) {                                          \
        NEXT(name);                                                                                \
        MODE(flags, flags);                                                                        \
        return stops(CHANGES(flags) && is_at(dir, path), 0) ? FAILED : next(dir, path, flags, mode);\
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

/* Names go away on a full disk, too. */
#define CALL(name, params, concerned, given, takes_room)                                           \
    int name params {                                                                              \
        NEXT(name);                                                                                \
        int must_fail = stops(concerned, 0) && (takes_room || act == READONLY);                    \
        return must_fail ? FAILED : next given;                                                    \
    }
CALL(rename, (const char *a, const char *b), is_in(a) || is_in(b), (a, b), 0)
CALL(renameat, (int d, const char *a, int e, const char *b), is_at(d, a) || is_at(e, b),
     (d, a, e, b), 0)
CALL(unlink, (const char *a), is_in(a), (a), 0)
CALL(unlinkat, (int d, const char *a, int f), is_at(d, a), (d, a, f), 0)
CALL(rmdir, (const char *a), is_in(a), (a), 0)
CALL(mkdir, (const char *a, mode_t m), is_in(a), (a, m), 1)
CALL(mkdirat, (int d, const char *a, mode_t m), is_at(d, a), (d, a, m), 1)
CALL(link, (const char *a, const char *b), is_in(b), (a, b), 1)
CALL(symlink, (const char *a, const char *b), is_in(b), (a, b), 1)
CALL(ftruncate, (int fd, off_t n), is_fd_in(fd), (fd, n), 0)
CALL(ftruncate64, (int fd, off64_t n), is_fd_in(fd), (fd, n), 0)
CALL(fsync, (int fd), is_fd_in(fd), (fd), 1)
CALL(fdatasync, (int fd), is_fd_in(fd), (fd), 1)
