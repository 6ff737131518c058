/*-------------------------------------------------------------------------
 *
 * http_transfer.h
 *	  One HTTP request; for http.c only.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_HTTP_TRANSFER_H
#define REDRIVE_HTTP_TRANSFER_H

#include "postgres.h"

#include <curl/curl.h>

#include "base/http.h"
#include "base/http_sockets.h"

typedef struct Pool Pool;

/* One request. */
typedef struct Transfer
{
	RedriveHttp *http;			/* whose it is */
	RedriveSockets *sockets;	/* and its sockets */
	struct Transfer *next;		/* in the list of unused or of done ones */
	Pool	   *pool;			/* that carries it, NULL = it is not under way */
	CURL	   *easy;			/* kept for the next request */
	int			generation;		/* of the options that easy has, 0 = none */
	CURLcode	code;			/* how it ended */
	struct curl_slist *headers;
	char	   *body;
	size_t		body_len;
	RedriveAddressRange *allow;
	int			n_allow;
	bool		allow_only;
	bool		too_large;		/* its body, which is not here */
	int			timeout_ms;
	void	   *arg;

	/* set by callbacks */
	bool		refused;		/* an address was */
	RedriveVerdict verdict;		/* the last one, if it was */
	bool		opened;			/* a socket was */
	int			open_errno;		/* why none could be */
	bool		begun;			/* the request has been sent, or partly */
	bool		again;			/* and libcurl wanted to send it again */
	size_t		header_bytes;
	bool		truncated;
	char	   *answer;
	size_t		answer_len;
	size_t		answer_size;
	char		trouble[CURL_ERROR_SIZE];	/* libcurl says what it was */
} Transfer;

extern Transfer *redrive_make_transfer(RedriveHttp *http, RedriveSockets *sockets);
extern bool redrive_prepare_transfer(Transfer *transfer, const RedriveHttpRequest *request, int generation);
extern void redrive_fill_result(Transfer *transfer, RedriveHttpResult *result);
extern void redrive_clear_transfer(Transfer *transfer);
extern void redrive_free_transfer(Transfer *transfer);

#endif							/* REDRIVE_HTTP_TRANSFER_H */
