/*-------------------------------------------------------------------------
 *
 * http_transfer.c
 *	  One HTTP request: its options, what libcurl asks while it runs, and what
 *	  came of it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "storage/fd.h"

#include "base/guc.h"
#include "base/http_transfer.h"

#define MAX_HEADER_BYTES 65536
#define CA_CACHE_S 600L

#define TLS_ERROR(code) ((code) == CURLE_SSL_CONNECT_ERROR || (code) == CURLE_PEER_FAILED_VERIFICATION || \
	(code) == CURLE_SSL_CACERT_BADFILE || (code) == CURLE_SSL_CERTPROBLEM || (code) == CURLE_SSL_CIPHER || \
	(code) == CURLE_SSL_ISSUER_ERROR || (code) == CURLE_SSL_CRL_BADFILE || (code) == CURLE_SSL_PINNEDPUBKEYNOTMATCH || \
	(code) == CURLE_SSL_INVALIDCERTSTATUS)

/* An answer of no known version has the same code as a URL of no known scheme. */
#define BAD_URL(transfer) \
	(((transfer)->code == CURLE_UNSUPPORTED_PROTOCOL || (transfer)->code == CURLE_URL_MALFORMAT) && !(transfer)->begun)

/*
 * Has a header no end?  libcurl says that memory is out, and since 8.6 CURLE_TOO_LARGE.
 * Should memory be out indeed, the request may have arrived, too.
 */
#define LONG_HEADER(transfer) \
	(((transfer)->code == CURLE_OUT_OF_MEMORY || (int) (transfer)->code == 100) && (transfer)->begun)

/* libcurl: open a socket to this address, which is the final one. */
static curl_socket_t
open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	Transfer   *transfer = arg;
	curl_socket_t fd;
	RedriveVerdict verdict = VERDICT_REFUSED;

	if (!transfer->too_large && purpose == CURLSOCKTYPE_IPCXN)
		verdict = redrive_judge_address(&address->addr, transfer->allow, transfer->n_allow, transfer->allow_only);
	if (verdict != VERDICT_ALLOWED)
	{
		transfer->refused = true;
		transfer->verdict = verdict;
		return CURL_SOCKET_BAD;
	}
	if (!AcquireExternalFD())
	{
		transfer->open_errno = EMFILE;
		return CURL_SOCKET_BAD;
	}
	fd = socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);
	if (fd < 0)
	{
		transfer->open_errno = errno;
		ReleaseExternalFD();
		return CURL_SOCKET_BAD;
	}
	if (!redrive_socket_opened(transfer->sockets, fd))
	{
		transfer->open_errno = ENOMEM;
		(void) close(fd);
		ReleaseExternalFD();
		return CURL_SOCKET_BAD;
	}
	transfer->opened = true;
	return fd;
}

/* Perhaps long after the request that opened it. */
static int
close_socket(void *arg, curl_socket_t fd)
{
	redrive_socket_closed(arg, fd);
	ReleaseExternalFD();
	return close(fd);
}

/*
 * libcurl: about to send on a connection.  It may be one that was opened for
 * another request, with another list.
 *
 * When such a connection breaks, libcurl sends the request again by itself, up
 * to five times.  But that is an attempt, and those are counted by others.
 */
static int
check_connection(void *arg, char *primary_ip, char *local_ip, int primary_port, int local_port)
{
	Transfer   *transfer = arg;
	RedriveVerdict verdict = VERDICT_REFUSED;

	if (transfer->begun)
	{
		transfer->again = true;
		return CURL_PREREQFUNC_ABORT;
	}
	if (!transfer->too_large)
		verdict = redrive_judge_address_text(primary_ip, primary_port, transfer->allow, transfer->n_allow, transfer->allow_only);
	if (verdict == VERDICT_ALLOWED)
	{
		transfer->begun = true;
		return CURL_PREREQFUNC_OK;
	}
	transfer->refused = true;
	transfer->verdict = verdict;
	transfer->opened = false;
	return CURL_PREREQFUNC_ABORT;
}

static size_t
keep_answer(char *bytes, size_t size, size_t n, void *arg)
{
	Transfer   *transfer = arg;
	size_t		len = Min(n, REDRIVE_HTTP_MAX_ANSWER - transfer->answer_len);

	if (transfer->answer_len + len + 1 > transfer->answer_size)
	{
		size_t		want = Max(4096, (transfer->answer_len + len + 1) * 2);
		char	   *bigger = realloc(transfer->answer, want);

		if (bigger == NULL)
			return 0;
		transfer->answer = bigger;
		transfer->answer_size = want;
	}
	memcpy(transfer->answer + transfer->answer_len, bytes, len);
	transfer->answer_len += len;
	transfer->answer[transfer->answer_len] = '\0';
	transfer->truncated = len < n;
	/* fewer than were given: libcurl ends the transfer */
	return len;
}

static size_t
count_header(char *bytes, size_t size, size_t n, void *arg)
{
	Transfer   *transfer = arg;

	transfer->header_bytes += n;
	return transfer->header_bytes > MAX_HEADER_BYTES ? 0 : n;
}

/* Make a transfer that has nothing to do yet; NULL when there is no memory. */
Transfer *
redrive_make_transfer(RedriveHttp *http, RedriveSockets *sockets)
{
	Transfer   *transfer = calloc(1, sizeof(Transfer));

	if (transfer == NULL)
		return NULL;
	transfer->http = http;
	transfer->sockets = sockets;
	return transfer;
}

/*
 * Forget the request, keep the handle and the buffer.
 *
 * The handle keeps its options, but not after a failure: libcurl counts in it
 * how often a connection broke.
 */
void
redrive_clear_transfer(Transfer *transfer)
{
	Transfer	cleared = {0};

	curl_slist_free_all(transfer->headers);
	free(transfer->body);
	free(transfer->allow);
	cleared.http = transfer->http;
	cleared.sockets = transfer->sockets;
	cleared.easy = transfer->easy;
	cleared.generation = transfer->code == CURLE_OK ? transfer->generation : 0;
	cleared.answer = transfer->answer;
	cleared.answer_size = transfer->answer_size;
	*transfer = cleared;
}

void
redrive_free_transfer(Transfer *transfer)
{
	redrive_clear_transfer(transfer);
	curl_easy_cleanup(transfer->easy);
	free(transfer->answer);
	free(transfer);
}

#define SET(option, value) (ok = ok && curl_easy_setopt(easy, option, value) == CURLE_OK)

/*
 * Make a handle anew, with the options that are the same for all requests; false
 * when that cannot be.
 *
 * No handle is only reset: it would go on with TLS sessions for which other
 * certificates were trusted.
 */
static bool
make_handle(Transfer *transfer)
{
	CURL	   *easy = curl_easy_init();
	const char *ca_file = redrive_http_ca_file;
	bool		ok = easy != NULL;

	curl_easy_cleanup(transfer->easy);
	transfer->easy = easy;
	SET(CURLOPT_PRIVATE, transfer);
	SET(CURLOPT_ERRORBUFFER, transfer->trouble);
	SET(CURLOPT_NOSIGNAL, 1L);
	SET(CURLOPT_FOLLOWLOCATION, 0L);
	SET(CURLOPT_PROXY, "");
	SET(CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);
	SET(CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_1_1);
	SET(CURLOPT_USERAGENT, "pg_redrive/" REDRIVE_VERSION);
	SET(CURLOPT_SSL_VERIFYPEER, 1L);
	SET(CURLOPT_SSL_VERIFYHOST, 2L);
	SET(CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	if (ca_file == NULL || ca_file[0] == '\0')
		ca_file = curl_version_info(CURLVERSION_NOW)->cainfo;
	if (ca_file != NULL && (ca_file == redrive_http_ca_file || access(ca_file, R_OK) == 0))
	{
		SET(CURLOPT_CAINFO, ca_file);
		/* with a directory besides, the file is read for each connection */
		SET(CURLOPT_CAPATH, NULL);
	}
#if LIBCURL_VERSION_NUM >= 0x075700

	/*
	 * 7.87; the one that runs may be older.  The certificates stay in memory:
	 * look at their file now and then.
	 */
	(void) curl_easy_setopt(easy, CURLOPT_CA_CACHE_TIMEOUT, CA_CACHE_S);
	/* a lookup that has not ended in time is left to its thread */
	(void) curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
#endif
	SET(CURLOPT_TCP_KEEPALIVE, 1L);
	SET(CURLOPT_OPENSOCKETFUNCTION, open_socket);
	SET(CURLOPT_OPENSOCKETDATA, transfer);
	SET(CURLOPT_CLOSESOCKETFUNCTION, close_socket);
	SET(CURLOPT_CLOSESOCKETDATA, transfer->sockets);
	SET(CURLOPT_PREREQFUNCTION, check_connection);
	SET(CURLOPT_PREREQDATA, transfer);
	SET(CURLOPT_WRITEFUNCTION, keep_answer);
	SET(CURLOPT_WRITEDATA, transfer);
	SET(CURLOPT_HEADERFUNCTION, count_header);
	SET(CURLOPT_HEADERDATA, transfer);
	return ok;
}

/*
 * Copy the request and set its options; false when there is no memory.
 *
 * What is set for one request is set for each: the handle may have the options
 * of another.
 */
bool
redrive_prepare_transfer(Transfer *transfer, const RedriveHttpRequest *request, int generation)
{
	CURL	   *easy;

	/* no waiting for "100 Continue", and no type that nobody asked for */
	static const char *const first[] = {"Expect:", "Content-Type:", "Accept:"};
	bool		ok = true;

	for (int i = 0; i < lengthof(first); i++)
	{
		bool		given = false;

		for (const char *const *header = request->headers; header != NULL && *header != NULL; header++)
			if (pg_strncasecmp(*header, first[i], strlen(first[i])) == 0)
				given = true;
		if (!given)
		{
			struct curl_slist *list = curl_slist_append(transfer->headers, first[i]);

			ok = ok && list != NULL;
			transfer->headers = list != NULL ? list : transfer->headers;
		}
	}
	for (const char *const *header = request->headers; header != NULL && *header != NULL; header++)
	{
		struct curl_slist *list = curl_slist_append(transfer->headers, *header);

		ok = ok && list != NULL;
		transfer->headers = list != NULL ? list : transfer->headers;
	}
	transfer->too_large = request->body_len > REDRIVE_HTTP_MAX_BODY;
	if (request->body != NULL && !transfer->too_large)
	{
		transfer->body = malloc(request->body_len + 1);
		if (transfer->body == NULL)
			return false;
		memcpy(transfer->body, request->body, request->body_len);
		transfer->body_len = request->body_len;
	}
	if (request->n_allow > 0)
	{
		transfer->allow = malloc(request->n_allow * sizeof(RedriveAddressRange));
		if (transfer->allow == NULL)
			return false;
		memcpy(transfer->allow, request->allow, request->n_allow * sizeof(RedriveAddressRange));
		transfer->n_allow = request->n_allow;
	}
	transfer->allow_only = request->allow_only;
	transfer->timeout_ms = request->timeout_ms;
	transfer->arg = request->arg;

	if (transfer->generation != generation && !make_handle(transfer))
		return false;
	transfer->generation = generation;
	easy = transfer->easy;
	SET(CURLOPT_URL, request->url);
	SET(CURLOPT_PROTOCOLS_STR, request->allow_http ? "https,http" : "https");
	SET(CURLOPT_TIMEOUT_MS, (long) request->timeout_ms);
	SET(CURLOPT_CONNECTTIMEOUT_MS, (long) request->connect_timeout_ms);
	SET(CURLOPT_HTTPHEADER, transfer->headers);
	if (transfer->body != NULL || strcmp(request->method, "POST") == 0)
	{
		SET(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) transfer->body_len);
		SET(CURLOPT_POSTFIELDS, transfer->body != NULL ? transfer->body : "");
	}
	else
		SET(CURLOPT_HTTPGET, 1L);
	SET(CURLOPT_CUSTOMREQUEST, request->method);
	return ok;
}
#undef SET

/* Say in words how far a request had come when its time was over. */
static const char *
phase(CURL *easy, bool sent)
{
	curl_off_t	at;

	if (curl_easy_getinfo(easy, CURLINFO_NAMELOOKUP_TIME_T, &at) != CURLE_OK || at == 0)
		return "looking up the name";
	if (curl_easy_getinfo(easy, CURLINFO_CONNECT_TIME_T, &at) != CURLE_OK || at == 0)
		return "connecting";
	if (curl_easy_getinfo(easy, CURLINFO_PRETRANSFER_TIME_T, &at) != CURLE_OK || at == 0)
		return "the TLS handshake";
	if (!sent)
		return "sending the request";
	if (curl_easy_getinfo(easy, CURLINFO_STARTTRANSFER_TIME_T, &at) != CURLE_OK || at == 0)
		return "waiting for the answer";
	return "reading the answer";
}

/* Say what came of a request that has ended. */
void
redrive_fill_result(Transfer *transfer, RedriveHttpResult *result)
{
	CURL	   *easy = transfer->easy;
	CURLcode	code = transfer->code;
	long		status = 0;
	long		os_errno = 0;
	curl_off_t	pretransfer = 0;
	curl_off_t	uploaded = 0;
	curl_off_t	retry_after = 0;
	curl_off_t	total = 0;

	(void) curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	(void) curl_easy_getinfo(easy, CURLINFO_OS_ERRNO, &os_errno);
	(void) curl_easy_getinfo(easy, CURLINFO_PRETRANSFER_TIME_T, &pretransfer);
	(void) curl_easy_getinfo(easy, CURLINFO_SIZE_UPLOAD_T, &uploaded);
	(void) curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &retry_after);
	(void) curl_easy_getinfo(easy, CURLINFO_TOTAL_TIME_T, &total);

	/* we ended it, but the answer is there */
	if (code == CURLE_WRITE_ERROR && transfer->truncated)
		code = CURLE_OK;
	memset(result, 0, sizeof(RedriveHttpResult));
	result->arg = transfer->arg;
	result->transfer = transfer;
	result->failure_code = code;
	result->status = status;
	result->sent = status > 0 || transfer->again || (pretransfer > 0 && uploaded >= (curl_off_t) transfer->body_len);
	result->refused = BAD_URL(transfer) || (code != CURLE_OK && transfer->refused && !transfer->opened && transfer->open_errno == 0);
	result->timed_out = code == CURLE_OPERATION_TIMEDOUT;
	result->tls = TLS_ERROR(code);
	result->ours = (code == CURLE_OUT_OF_MEMORY && !transfer->begun) || code == CURLE_FAILED_INIT ||
		(code != CURLE_OK && !transfer->opened && transfer->open_errno != 0) ||
		(code == CURLE_COULDNT_CONNECT && !result->refused && os_errno == EADDRNOTAVAIL);
	result->truncated = transfer->truncated;
	result->retry_after_s = (int) Max(Min(retry_after, 1000000), 0);
	result->body = transfer->answer_len > 0 ? transfer->answer : "";
	result->body_len = transfer->answer_len;
	result->total_ms = total / 1000.0;
	if (BAD_URL(transfer))
		snprintf(result->error, sizeof(result->error), "the URL is not one that requests can be sent to");
	else if (result->refused && transfer->too_large)
		snprintf(result->error, sizeof(result->error), "the body is longer than %d bytes", REDRIVE_HTTP_MAX_BODY);
	else if (result->refused && transfer->verdict == VERDICT_PORT_REFUSED)
		snprintf(result->error, sizeof(result->error), "the port is not one of redrive.http_ports");
	else if (result->refused && transfer->verdict == VERDICT_HTTP_REFUSED)
		snprintf(result->error, sizeof(result->error), "http is only for addresses of redrive.http_allow_cidr, others need https");
	else if (result->refused)
		snprintf(result->error, sizeof(result->error), "the address is not of the public network and not allowed");
	else if (result->ours)
		snprintf(result->error, sizeof(result->error), "no resources here to send it: %s",
				 transfer->open_errno == EMFILE || transfer->open_errno == ENFILE ? "file descriptors" :
				 os_errno == EADDRNOTAVAIL ? "local ports" : "memory");
	else if (result->timed_out)
		snprintf(result->error, sizeof(result->error), "time-out after %d ms, %s", (int) (total / 1000), phase(easy, result->sent));
	else if (transfer->header_bytes > MAX_HEADER_BYTES || LONG_HEADER(transfer))
		snprintf(result->error, sizeof(result->error), "the headers of the answer are too long");
	else if (code == CURLE_UNSUPPORTED_PROTOCOL)
		snprintf(result->error, sizeof(result->error), "the answer is not HTTP");
	else if (transfer->again)
		snprintf(result->error, sizeof(result->error), "the connection was closed before an answer came");
	else if (result->tls && transfer->trouble[0] != '\0')
	{
		/*
		 * which of many reasons; what it quotes of a certificate may be in
		 * any encoding
		 */
		strlcpy(result->error, transfer->trouble, sizeof(result->error));
		for (char *c = result->error; *c != '\0'; c++)
			if (*c < ' ' || *c > '~')
				*c = '?';
	}
	else if (code != CURLE_OK)
		snprintf(result->error, sizeof(result->error), "%s", curl_easy_strerror(code));
}
