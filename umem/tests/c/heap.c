/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Preloaded into a program, gives it a malloc whose memory is served, page by page as it is touched, by a second process. The program
 * knows nothing of it. How many pages that process has served it writes to the file that HEAP_SERVED names.
 *
 * Only the program's first thread has such memory: what serves it, in this process, must not need it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <umem.h>

enum { PAGE = 4096, HEADER = 16, CLASSES = 48 };
#define SERVED_SIZE ((size_t)1 << 30)
#define OWN_SIZE ((size_t)1 << 30)

/* Blocks of powers of 2, which go back to a list of their size. */
struct arena {
	/* Each its own: who waits for a page may hold the one, and who brings it must not need that. */
	pthread_mutex_t lock;
	char *next, *end;
	void **free[CLASSES];
};

static struct arena own = { .lock = PTHREAD_MUTEX_INITIALIZER };
static struct arena served = { .lock = PTHREAD_MUTEX_INITIALIZER };
static __thread int is_first;

static int class_of(size_t size)
{
	int class = 5;
	while (((size_t)1 << class) < size + HEADER)
		class++;
	return class;
}

static void *take(struct arena *arena, size_t size)
{
	int class = class_of(size);
	void **block = arena->free[class];
	if (block != NULL) {
		arena->free[class] = *block;
		return block;
	}
	if (arena->end - arena->next < (ptrdiff_t)1 << class)
		return NULL;
	size_t *header = (size_t *)arena->next;
	arena->next += (size_t)1 << class;
	*header = class;
	return (char *)header + HEADER;
}

void *malloc(size_t size)
{
	if (size > (size_t)1 << 40) {
		errno = ENOMEM;
		return NULL;
	}
	struct arena *arena = is_first ? &served : &own;
	pthread_mutex_lock(&arena->lock);
	if (arena->next == NULL) {
		arena->next = mmap(NULL, OWN_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		arena->end = arena->next + OWN_SIZE;
	}
	void *block = take(arena, size);
	pthread_mutex_unlock(&arena->lock);
	if (block == NULL)
		errno = ENOMEM;
	return block;
}

static size_t room(void *block)
{
	return ((size_t)1 << *(size_t *)((char *)block - HEADER)) - HEADER;
}

void free(void *block)
{
	if (block == NULL)
		return;
	struct arena *arena = (char *)block >= own.end - OWN_SIZE && (char *)block < own.end ? &own : &served;
	pthread_mutex_lock(&arena->lock);
	int class = class_of(room(block));
	*(void ***)block = arena->free[class];
	arena->free[class] = block;
	pthread_mutex_unlock(&arena->lock);
}

void *calloc(size_t count, size_t size)
{
	size_t length;
	if (__builtin_mul_overflow(count, size, &length)) {
		errno = ENOMEM;
		return NULL;
	}
	void *block = malloc(length);
	return block == NULL ? NULL : memset(block, 0, length);
}

void *realloc(void *block, size_t size)
{
	if (block == NULL || size <= room(block))
		return block == NULL ? malloc(size) : block;
	void *larger = malloc(size);
	if (larger != NULL) {
		memcpy(larger, block, room(block));
		free(block);
	}
	return larger;
}

int posix_memalign(void **block, size_t alignment, size_t size)
{
	/* Given back never: who asks for it does so a few times. */
	char *start = malloc(size + alignment);
	if (start == NULL)
		return ENOMEM;
	*block = start + (alignment - (size_t)start % alignment) % alignment;
	if (*block != start) {
		size_t *header = (size_t *)((char *)*block - HEADER);
		if ((char *)header > start)
			*header = 5;
	}
	return 0;
}

void *aligned_alloc(size_t alignment, size_t size)
{
	void *block;
	return posix_memalign(&block, alignment, size) == 0 ? block : NULL;
}

size_t malloc_usable_size(void *block)
{
	return block == NULL ? 0 : room(block);
}

/* Twenty lines that serve: pages come full of something that a program which relies on them being empty would trip over. */
static void serve(struct umem_device *device)
{
	uint64_t pages[64];
	long total = 0;
	ssize_t count;
	char *window = umem_window(device);
	while ((count = umem_read(device, pages, 64)) > 0) {
		for (ssize_t at = 0; at < count; at++)
			memset(window + pages[at] * PAGE, 0xa5, PAGE);
		if (umem_write(device, pages, count) != count)
			_exit(1);
		for (ssize_t at = 0; at < count; at++)
			madvise(window + pages[at] * PAGE, PAGE, MADV_REMOVE);
		total += count;
	}
	int report = open(getenv("HEAP_SERVED"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
	dprintf(report, "%ld\n", total);
	_exit(0);
}

__attribute__((constructor)) static void begin(void)
{
	struct umem_device *device;
	void *memory;
	if (getenv("HEAP_SERVED") == NULL)
		return;
	if (umem_create(SERVED_SIZE, 512, 0, &device) != 0)
		abort();
	if (fork() == 0) {
		umem_drop(device, UMEM_CLIENT);
		serve(device);
	}
	umem_drop(device, UMEM_SERVER);
	if (umem_map(device, &memory) != 0)
		abort();
	umem_close(device);
	served.next = memory;
	served.end = served.next + SERVED_SIZE;
	is_first = 1;
}
