/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The interface of the ummunotify v2 patch, R. Dreier and E. Munson 2010: a process registers ranges of its addresses and
 * is told when mappings in them are invalidated. docs/ummunotify.md of umem says how it is meant, and how programs that open
 * /dev/ummunotify are run.
 */
#ifndef _LINUX_UMMUNOTIFY_H
#define _LINUX_UMMUNOTIFY_H

#include <linux/types.h>
#include <linux/ioctl.h>

/* A range of addresses, start <= address < end, of any granularity. flags and reserved are 0. */
struct ummunotify_register_ioctl {
	__u64 start;
	__u64 end;
	__u64 user_cookie;	/* the caller's name for the range; no two ranges have the same */
	__u32 flags;
	__u32 reserved;
};

#define UMMUNOTIFY_MAGIC		'U'

/* In: features that the caller would use. Out: those among them that there are, so far none. Before all other use. */
#define UMMUNOTIFY_EXCHANGE_FEATURES	_IOWR(UMMUNOTIFY_MAGIC, 1, __u32)

/* Ranges may overlap, and be the same. */
#define UMMUNOTIFY_REGISTER_REGION	_IOW(UMMUNOTIFY_MAGIC, 2, struct ummunotify_register_ioctl)

/* Takes the user_cookie. There is no event of that range from then on. */
#define UMMUNOTIFY_UNREGISTER_REGION	_IOW(UMMUNOTIFY_MAGIC, 3, __u64)

enum {
	/* Something in a range was invalidated; user_cookie_counter is the range's cookie. */
	UMMUNOTIFY_EVENT_TYPE_INVAL	= 0,
	/* No more events; user_cookie_counter is the value of the counter at which that was so. */
	UMMUNOTIFY_EVENT_TYPE_LAST	= 1,
};

enum {
	/* The part between hint_start and hint_end was invalidated. Without it, several parts were, and the hint is the range. */
	UMMUNOTIFY_EVENT_FLAG_HINT	= 1 << 0,
};

/* What read() gives. */
struct ummunotify_event {
	__u32 type;
	__u32 flags;
	__u64 hint_start;
	__u64 hint_end;
	__u64 user_cookie_counter;
};

#endif /* _LINUX_UMMUNOTIFY_H */
