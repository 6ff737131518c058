/*-------------------------------------------------------------------------
 *
 * http.h
 *	  HTTP requests: many at a time, none of them waited for.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_HTTP_H
#define REDRIVE_HTTP_H

#include "postgres.h"

#include "base/address.h"

/* The longest answer that is read; what is longer is cut off there. */
#define REDRIVE_HTTP_MAX_ANSWER 65536

/* The longest body that is sent, in bytes. */
#define REDRIVE_HTTP_MAX_BODY (1024 * 1024)

/* Requests under way, with their descriptors. */
typedef struct RedriveHttp RedriveHttp;

typedef struct RedriveHttpRequest
{
	const char *method;			/* GET, POST, PUT, PATCH or DELETE */
	const char *url;			/* checked by redrive_check_url() */
	const char *const *headers; /* "Name: value", ends with NULL; checked */
	const char *body;			/* NULL = none */
	size_t		body_len;
	int			timeout_ms;		/* of all of it */
	int			connect_timeout_ms;
	bool		allow_http;		/* https only, if not */
	bool		allow_only;		/* only to the ranges of allow */
	const RedriveAddressRange *allow;	/* ranges that are open besides the
										 * public network */
	int			n_allow;
	void	   *arg;			/* comes back with the result */
} RedriveHttpRequest;

typedef struct RedriveHttpResult
{
	void	   *arg;
	int			failure_code;	/* 0 = an answer came */
	int			status;			/* of the answer, 0 = none */
	bool		refused;		/* by us, for its address, URL or size;
								 * nothing was sent, and will be another time */
	bool		ours;			/* no descriptors, ports or memory: not the
								 * fault of the other side */
	bool		sent;			/* the other side may have acted */
	bool		timed_out;
	bool		tls;			/* the certificate or the handshake */
	bool		truncated;		/* the answer was cut off */
	int			retry_after_s;	/* 0 = none */
	const char *body;			/* the answer, bytes as they came, and a NUL */
	size_t		body_len;
	char		error[160];		/* in words, without anything of the request */
	double		total_ms;
	void	   *transfer;		/* private */
} RedriveHttpResult;

extern RedriveHttp *redrive_http_create(int max_transfers);
extern void redrive_http_reload(RedriveHttp *http, int max_transfers);
extern int	redrive_http_fd(RedriveHttp *http);
extern long redrive_http_timeout_ms(RedriveHttp *http);
extern bool redrive_http_start(RedriveHttp *http, const RedriveHttpRequest *request);
extern void redrive_http_drive(RedriveHttp *http);
extern bool redrive_http_next_result(RedriveHttp *http, RedriveHttpResult *result);
extern void redrive_http_free_result(RedriveHttpResult *result);
extern int	redrive_http_in_flight(RedriveHttp *http);
extern void redrive_http_cancel_unsent(RedriveHttp *http, void (*cancelled) (void *arg));
extern void redrive_http_destroy(RedriveHttp *http);

/* http_check.c */
extern void redrive_check_url(const char *url, bool allow_http);
extern char *redrive_url_host(const char *url);
extern const char **redrive_check_headers(Datum headers, bool allow_secret, int room);
extern char *redrive_sign(const char *secret, const char *id, int64 timestamp, const char *body, size_t body_len);
extern char *redrive_to_utf8(char *text, size_t *len);
extern char *redrive_clean_text(const char *bytes, size_t len, size_t most);

#endif							/* REDRIVE_HTTP_H */
