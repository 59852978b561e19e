/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The interface of the umem v4 patch, I. Yamahata 2012: memory whose pages another process serves. docs/umem.md of umem says how
 * it is meant, and how programs that open /dev/umem are run.
 */
#ifndef _LINUX_UMEM_H
#define _LINUX_UMEM_H

#include <linux/types.h>
#include <linux/ioctl.h>

/* In: size in bytes. Out: size rounded up to whole pages, and a descriptor of the file through which pages are served. */
struct umem_init {
	__u64 size;
	__s32 shmem_fd;
	__s32 padding;
};

#define UMEMIO			0x1E

/* Once, and before everything else. */
#define UMEM_INIT		_IOWR(UMEMIO, 0x0, struct umem_init)

/* EBUSY until every page is there. Then the memory is ordinary, and the device has nothing to do with it any more. */
#define UMEM_MAKE_VMA_ANONYMOUS	_IO(UMEMIO, 0x1)

/* read() and write() take and give __u64: indices of pages. */

#endif /* _LINUX_UMEM_H */
