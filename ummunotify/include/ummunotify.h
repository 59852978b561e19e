/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * libummunotify: what a program did with /dev/ummunotify, without a device. The structures are those of
 * <linux/ummunotify.h>; docs/ummunotify.md of umem says what they mean and what each watcher sees.
 *
 * Functions that return int or ssize_t return a negative errno if they fail. All may be called by any thread.
 */
#ifndef UMMUNOTIFY_H
#define UMMUNOTIFY_H

#include <sys/types.h>

#include <linux/ummunotify.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A notifier: registered ranges of the addresses of the process that opened it, and their events. */
struct ummunotify;

/*
 * Opens one with the watcher named: "kvm", "perf", "userfaultfd", or "auto" (also NULL), the first of these that there is.
 * -EINVAL: there is no watcher of that name. -ENODEV: it is not to be had here; ummunotify_last_error() says why.
 */
int ummunotify_open(const char *watcher, struct ummunotify **notifier);
void ummunotify_close(struct ummunotify *notifier);

/* Why this thread's last call of ummunotify_open failed. */
const char *ummunotify_last_error(void);

/* The watcher's name. */
const char *ummunotify_watcher(const struct ummunotify *notifier);

/* Before all other use, or -EINVAL. Leaves of *features what there is: nothing so far. */
int ummunotify_exchange_features(struct ummunotify *notifier, __u32 *features);

/* -EINVAL: the cookie is in use, or the range ends before it starts, or (userfaultfd) nothing is mapped there. -ENOMEM. */
int ummunotify_register(struct ummunotify *notifier, const struct ummunotify_register_ioctl *range);

/* -EINVAL: no range has this cookie. */
int ummunotify_unregister(struct ummunotify *notifier, __u64 cookie);

/* Up to count events; how many. wait: if there is none, until there is one (-EINTR: a signal came), else -EAGAIN. */
ssize_t ummunotify_read(struct ummunotify *notifier, struct ummunotify_event *events, size_t count, int wait);

/* For poll, select, epoll: readable while there are events. It is the notifier's, and closed with it. */
int ummunotify_fd(struct ummunotify *notifier);

/*
 * The counter. It has moved before the call that invalidates a registered range returns: as long as it stands still, nothing
 * registered has been invalidated. Not for handlers of signals.
 */
__u64 ummunotify_count(const struct ummunotify *notifier);

/*
 * The same counter, where it is in memory, to look at it without a call. NULL: it is nowhere; the watcher is "perf", whose
 * counter is made when ummunotify_count() asks for it.
 */
const volatile __u64 *ummunotify_counter(const struct ummunotify *notifier);

/* A descriptor whose first page, mapped MAP_SHARED and PROT_READ by any process, is the counter's. -ENODEV: as above. */
int ummunotify_counter_fd(const struct ummunotify *notifier);

#ifdef __cplusplus
}
#endif

#endif /* UMMUNOTIFY_H */
