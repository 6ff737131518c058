/*-------------------------------------------------------------------------
 *
 * http_sockets.h
 *	  The sockets of libcurl, in an epoll descriptor; for http.c and
 *	  http_transfer.c only.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_HTTP_SOCKETS_H
#define REDRIVE_HTTP_SOCKETS_H

#include "postgres.h"

#include <curl/curl.h>

typedef struct RedriveSocket RedriveSocket;

typedef struct RedriveSockets
{
	int			epoll_fd;
	RedriveSocket *by_fd;		/* those of connections, by their number */
	int			n;				/* for so many numbers there is room */
} RedriveSockets;

extern bool redrive_sockets_init(RedriveSockets *sockets);
extern void redrive_sockets_free(RedriveSockets *sockets);
extern bool redrive_socket_opened(RedriveSockets *sockets, int fd);
extern void redrive_socket_closed(RedriveSockets *sockets, int fd);
extern int	redrive_socket_watch(CURL *easy, curl_socket_t fd, int what, void *arg, void *unused);
extern bool redrive_socket_unwanted(RedriveSockets *sockets, int fd);

#endif							/* REDRIVE_HTTP_SOCKETS_H */
