/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * libumem: memory whose pages a program serves, without a device. docs/umem.md of umem says what the words mean.
 *
 * Functions that return int or ssize_t return a negative errno if they fail. All may be called by any thread.
 */
#ifndef UMEM_H
#define UMEM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A device: one of its halves, or both. */
struct umem_device;

/* The halves. */
#define UMEM_SERVER	1
#define UMEM_CLIENT	2

/* The server gives up its right to drop a page that it has served, or to write to it: it is mapped, and not copied. */
#define UMEM_IN_PLACE	1

/* The number of requests that the driver had room for. */
#define UMEM_DRIVER_REQUESTS	16384

/*
 * A new device with both halves. size: in bytes, rounded up to whole pages. max_requests: how many may wait to be read, at least
 * (rounded up to 512 and a power of 2). flags: 0 or UMEM_IN_PLACE. -EINVAL: a size of 0, or flags that there are not.
 */
int umem_create(uint64_t size, uint32_t max_requests, uint32_t flags, struct umem_device **device);

/* Frees what this process has of it. Memory that was mapped stays, and is served as before. */
void umem_close(struct umem_device *device);

/* Lets go of halves (UMEM_SERVER | UMEM_CLIENT), which belongs to a fork in which each process keeps one. */
void umem_drop(struct umem_device *device, uint32_t halves);

/* Sends one half, UMEM_SERVER or UMEM_CLIENT, over a Unix socket to umem_receive, which waits for it. -ENXIO: it is not here. */
int umem_send(const struct umem_device *device, int socket, uint32_t half);
int umem_receive(int socket, uint32_t half, struct umem_device **device);

/* Bytes. */
uint64_t umem_size(const struct umem_device *device);

/* For poll, select, epoll, and O_NONBLOCK. It is the device's, and closed with it. */
int umem_fd(const struct umem_device *device);

/* The file through which pages are served. It is the device's, and closed with it. */
int umem_window_fd(const struct umem_device *device);

/* The same, mapped: umem_size() bytes, until umem_close. NULL: there is no address space for it. */
void *umem_window(const struct umem_device *device);

/*
 * The pages that are waited for: up to count; how many. 0: there is no client any more. -EINVAL: count is 0. -EAGAIN: there is none and the
 * descriptor is O_NONBLOCK. -EINTR: a signal came.
 */
ssize_t umem_read(struct umem_device *device, uint64_t *pages, size_t count);

/*
 * These pages are ready in the window; how many. -EINVAL: count is 0, or there is no such page (those before it are served).
 * When it has returned, the window can be used for other things, unless the device is UMEM_IN_PLACE.
 */
ssize_t umem_write(struct umem_device *device, const uint64_t *pages, size_t count);

/* Serves count pages from content on as the pages from first on: as umem_write, but not through the window. */
int umem_write_from(struct umem_device *device, uint64_t first, const void *content, size_t count);

/*
 * Serves count pages from content on as the pages from first on, and takes them: in the process with the memory they are moved there and
 * not copied. content is private anonymous memory, aligned to a page; what is in it afterwards is not said.
 */
int umem_donate(struct umem_device *device, uint64_t first, void *content, size_t count);

/* Maps the memory, once. -EBUSY: it was. The caller unmaps it. */
int umem_map(struct umem_device *device, void **start);

/* -EBUSY: not every page is there. */
int umem_make_anonymous(struct umem_device *device);

/* Why this thread's last function that failed did. */
const char *umem_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* UMEM_H */
