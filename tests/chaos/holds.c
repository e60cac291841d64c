/* Keeps the caller, and with it Python's interpreter lock, until a file is there. */
#include <unistd.h>

void hold(const char *path) {
    while (access(path, F_OK)) usleep(10000);
}
