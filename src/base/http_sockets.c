/*-------------------------------------------------------------------------
 *
 * http_sockets.c
 *	  The sockets of libcurl, in an epoll descriptor.
 *
 * libcurl says with each request that it wants its connection watched, and
 * after it that it does not.  One that is kept will be wanted again for the same
 * events, so it stays watched until an event comes that nobody wants.  That is
 * only possible with sockets of which we are told that they are closed: those
 * of connections, and not those by which its threads tell that they have looked
 * up a name.
 *
 * Called from callbacks of libcurl, therefore without palloc and ereport.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "storage/fd.h"

#include "base/http_sockets.h"

struct RedriveSocket
{
	bool		open;			/* it is that of a connection */
	bool		wanted;			/* by libcurl */
	uint32		events;			/* that epoll watches it for, 0 = none */
};

/* Begin with no sockets; false when there is no descriptor for it. */
bool
redrive_sockets_init(RedriveSockets *sockets)
{
	memset(sockets, 0, sizeof(RedriveSockets));
	sockets->epoll_fd = -1;
	if (AcquireExternalFD())
	{
		sockets->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
		if (sockets->epoll_fd < 0)
			ReleaseExternalFD();
	}
	return sockets->epoll_fd >= 0;
}

/* They have all been closed. */
void
redrive_sockets_free(RedriveSockets *sockets)
{
	if (sockets->epoll_fd >= 0)
	{
		close(sockets->epoll_fd);
		ReleaseExternalFD();
	}
	free(sockets->by_fd);
}

/* A connection has this socket; false when there is no memory. */
bool
redrive_socket_opened(RedriveSockets *sockets, int fd)
{
	if (fd >= sockets->n)
	{
		int			n = Max(fd + 1, sockets->n * 2);
		RedriveSocket *bigger = realloc(sockets->by_fd, n * sizeof(RedriveSocket));

		if (bigger == NULL)
			return false;
		memset(bigger + sockets->n, 0, (n - sockets->n) * sizeof(RedriveSocket));
		sockets->by_fd = bigger;
		sockets->n = n;
	}
	sockets->by_fd[fd] = (RedriveSocket)
	{
		.open = true
	};
	return true;
}

/* It is about to be closed, by which epoll forgets it. */
void
redrive_socket_closed(RedriveSockets *sockets, int fd)
{
	sockets->by_fd[fd].open = false;
}

/* Find the socket of a connection; NULL when it is another one. */
static RedriveSocket *
find_socket(RedriveSockets *sockets, int fd)
{
	return fd < sockets->n && sockets->by_fd[fd].open ? &sockets->by_fd[fd] : NULL;
}

/* libcurl: watch this socket, or do not any more. */
int
redrive_socket_watch(CURL *easy, curl_socket_t fd, int what, void *arg, void *unused)
{
	RedriveSockets *sockets = arg;
	RedriveSocket *kept = find_socket(sockets, fd);
	struct epoll_event event = {.data.fd = fd};
	int			operation = kept != NULL && kept->events != 0 ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;

	if (kept != NULL)
		kept->wanted = what != CURL_POLL_REMOVE;
	if (what == CURL_POLL_REMOVE)
	{
		if (kept == NULL)
			(void) epoll_ctl(sockets->epoll_fd, EPOLL_CTL_DEL, fd, &event);
		return 0;
	}
	event.events = ((what & CURL_POLL_IN) ? EPOLLIN : 0) | ((what & CURL_POLL_OUT) ? EPOLLOUT : 0);
	if (kept != NULL && kept->events == event.events)
		return 0;
	if (epoll_ctl(sockets->epoll_fd, operation, fd, &event) != 0 &&
		(errno != EEXIST || epoll_ctl(sockets->epoll_fd, EPOLL_CTL_MOD, fd, &event) != 0))
		return -1;
	if (kept != NULL)
		kept->events = event.events;
	return 0;
}

/* Does nobody want this socket's events?  Then there will be none any more. */
bool
redrive_socket_unwanted(RedriveSockets *sockets, int fd)
{
	RedriveSocket *kept = find_socket(sockets, fd);
	struct epoll_event event = {0};

	if (kept == NULL || kept->wanted)
		return false;
	(void) epoll_ctl(sockets->epoll_fd, EPOLL_CTL_DEL, fd, &event);
	kept->events = 0;
	return true;
}
