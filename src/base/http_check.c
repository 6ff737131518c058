/*-------------------------------------------------------------------------
 *
 * http_check.c
 *	  Check what requests are made of, when it is given; and sign bodies.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <curl/curl.h>

#include "catalog/namespace.h"
#include "common/base64.h"
#include "common/cryptohash.h"
#include "common/hmac.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"

#include "base/guc.h"
#include "base/http.h"

#define MAX_URL 2000
#define MAX_HEADER 4000
#define MAX_HEADERS 50

PG_FUNCTION_INFO_V1(redrive__check_url);
PG_FUNCTION_INFO_V1(redrive__check_headers);
PG_FUNCTION_INFO_V1(redrive__unlisted_port);

/* Headers that we, libcurl or the protocol set. */
static const char *const reserved[] = {
	"connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "te", "trailer", "transfer-encoding",
	"upgrade", "webhook-id", "webhook-sequence", "webhook-signature", "webhook-timestamp",
};

static void
bad_url(const char *detail, const char *hint)
{
	/* the URL itself may hold something secret */
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid URL"),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/*
 * Raise an error (22023) unless this is a URL that requests can be sent to:
 * https, or with allow_http http, with a host and without a password.
 */
void
redrive_check_url(const char *url, bool allow_http)
{
	CURLU	   *parts;
	CURLUcode	code;
	char	   *scheme = NULL;
	char	   *user = NULL;
	char	   *password = NULL;
	char	   *fragment = NULL;
	char	   *port = NULL;
	const char *detail = NULL;
	const char *hint = "Give an address like https://example.com/path.";

	if (strlen(url) > MAX_URL)
		bad_url(psprintf("It is longer than %d bytes.", MAX_URL), hint);
	for (const char *c = url; *c != '\0'; c++)
		if (*c <= ' ' || *c > '~')
			bad_url("It has a space, a control character or one that is not ASCII.", "Write such characters as %XX.");
	parts = curl_url();
	if (parts == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	code = curl_url_set(parts, CURLUPART_URL, url, CURLU_NON_SUPPORT_SCHEME);
	if (code == CURLUE_OK)
		code = curl_url_get(parts, CURLUPART_SCHEME, &scheme, 0);
	if (code != CURLUE_OK)
		detail = "It cannot be understood.";
	else if (strcmp(scheme, "http") == 0 && !allow_http)
	{
		detail = "Its scheme is http, which anybody on the way can read.";
		hint = "Use https, or allow_http => true for a network that you trust.";
	}
	else if (strcmp(scheme, "https") != 0 && strcmp(scheme, "http") != 0)
		detail = "Its scheme is neither https nor http.";
	else if (strncmp(url + strlen(scheme), "://", 3) != 0 || url[strlen(scheme) + 3] == '/')
		/* libcurl takes one or three for two; who reads it may not */
		detail = "There are not two slashes before its host.";
	else if (curl_url_get(parts, CURLUPART_USER, &user, 0) == CURLUE_OK || curl_url_get(parts, CURLUPART_PASSWORD, &password, 0) == CURLUE_OK)
	{
		detail = "It has a user name or a password.";
		hint = "Give those as a secret.";
	}
	else if (curl_url_get(parts, CURLUPART_FRAGMENT, &fragment, 0) == CURLUE_OK)
		detail = "It has a fragment, which is never sent.";
	else if (curl_url_get(parts, CURLUPART_PORT, &port, 0) == CURLUE_OK && atoi(port) == 0)
		detail = "Its port is 0, which nothing listens on.";
	curl_free(scheme);
	curl_free(user);
	curl_free(password);
	curl_free(fragment);
	curl_free(port);
	curl_url_cleanup(parts);
	if (detail != NULL)
		bad_url(detail, hint);
}

/*
 * Return the host of a URL, with its port if it names one, palloc'd; NULL when
 * it cannot be understood.
 */
char *
redrive_url_host(const char *url)
{
	CURLU	   *parts = curl_url();
	char	   *host = NULL;
	char	   *port = NULL;
	char	   *result = NULL;

	if (parts != NULL && curl_url_set(parts, CURLUPART_URL, url, 0) == CURLUE_OK &&
		curl_url_get(parts, CURLUPART_HOST, &host, 0) == CURLUE_OK)
		result = curl_url_get(parts, CURLUPART_PORT, &port, 0) == CURLUE_OK ? psprintf("%s:%s", host, port) : pstrdup(host);
	curl_free(host);
	curl_free(port);
	curl_url_cleanup(parts);
	return result;
}

/* Is this a token of RFC 9110? */
static bool
is_token(const char *name)
{
	if (name[0] == '\0')
		return false;
	for (const char *c = name; *c != '\0'; c++)
		if (!((*c >= '0' && *c <= '9') || (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || strchr("!#$%&'*+-.^_`|~", *c) != NULL))
			return false;
	return true;
}

static void
bad_header(const char *name, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 is_token(name) && strlen(name) <= 100 ? errmsg("invalid header \"%s\"", name) : errmsg("invalid header"),
			 errdetail("%s", detail),
			 errhint("Give headers as an object of names and texts, for example {\"Accept\": \"application/json\"}.")));
}

static void
check_header(const char *name, const char *value, bool allow_secret)
{
	if (!is_token(name))
		bad_header(name, "Its name has a character that names of headers may not have.");
	for (int i = 0; i < lengthof(reserved); i++)
		if (pg_strcasecmp(name, reserved[i]) == 0)
			bad_header(name, "It is set by pg_redrive or by the protocol.");
	if (pg_strncasecmp(name, "proxy-", 6) == 0)
		bad_header(name, "It is for proxies.");
	if (!allow_secret && (pg_strcasecmp(name, "authorization") == 0 || pg_strcasecmp(name, "cookie") == 0))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid header \"%s\"", name),
				 errdetail("Headers can be seen; this one holds something secret."),
				 errhint("Use redrive.set_platform_secret().")));
	if (strlen(name) + strlen(value) > MAX_HEADER)
		bad_header(name, psprintf("It is longer than %d bytes.", MAX_HEADER));
	for (const char *c = value; *c != '\0'; c++)
		if (((unsigned char) *c < ' ' && *c != '\t') || *c == 0x7f)
			bad_header(name, "Its value has a line break or another control character.");
}

/*
 * Return the headers of an object as "Name: value", ending with NULL, palloc'd,
 * with room for so many more.
 *
 * Errors: 22023 when it is no object of texts, or one of them may not be sent.
 */
const char **
redrive_check_headers(Datum headers, bool allow_secret, int room)
{
	Jsonb	   *object = DatumGetJsonbP(headers);
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	value;
	const char **list;
	int			n = 0;
	char	   *name = NULL;

	if (!JB_ROOT_IS_OBJECT(object))
		bad_header("", "They are not an object.");
	if (JB_ROOT_COUNT(object) > MAX_HEADERS)
		bad_header("", psprintf("There are more than %d.", MAX_HEADERS));
	list = palloc0((JB_ROOT_COUNT(object) + room + 1) * sizeof(char *));
	it = JsonbIteratorInit(&object->root);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			name = pnstrdup(value.val.string.val, value.val.string.len);
		else if (token == WJB_VALUE)
		{
			char	   *text;

			if (value.type != jbvString)
				bad_header(name, "Its value is not a text.");
			text = pnstrdup(value.val.string.val, value.val.string.len);
			check_header(name, text, allow_secret);
			for (int i = 0; i < n; i++)
				if (pg_strncasecmp(list[i], name, strlen(name)) == 0 && list[i][strlen(name)] == ':')
					bad_header(name, "It is there twice.");
			/* "Name;" is how libcurl wants one without a value */
			list[n++] = text[0] != '\0' ? psprintf("%s: %s", name, text) : psprintf("%s;", name);
		}
	}
	return list;
}

/*
 * Return a header's value for webhook-signature: v1 and HMAC-SHA256, in base64,
 * of id, time and body.
 *
 * secret is as it was set: base64 after "whsec_", else its bytes.  palloc'd.
 */
char *
redrive_sign(const char *secret, const char *id, int64 timestamp, const char *body, size_t body_len)
{
	static const char prefix[] = "whsec_";
	const uint8 *key = (const uint8 *) secret;
	int			key_len = strlen(secret);
	uint8		digest[32];
	char	   *result = palloc0(3 + pg_b64_enc_len(sizeof(digest)) + 1);
	char	   *head = psprintf("%s.%lld.", id, (long long) timestamp);
	pg_hmac_ctx *hmac = pg_hmac_create(PG_SHA256);
	int			n;

	if (strncmp(secret, prefix, strlen(prefix)) == 0)
	{
		const char *encoded = secret + strlen(prefix);
		uint8	   *bytes = palloc(pg_b64_dec_len(strlen(encoded)) + 1);

		n = pg_b64_decode(encoded, strlen(encoded), (void *) bytes, pg_b64_dec_len(strlen(encoded)));
		if (n > 0)
		{
			key = bytes;
			key_len = n;
		}
	}
	if (hmac == NULL || pg_hmac_init(hmac, key, key_len) < 0 || pg_hmac_update(hmac, (uint8 *) head, strlen(head)) < 0 ||
		pg_hmac_update(hmac, (const uint8 *) body, body_len) < 0 || pg_hmac_final(hmac, digest, sizeof(digest)) < 0)
		elog(ERROR, "could not sign a request");
	pg_hmac_free(hmac);
	strcpy(result, "v1,");
	n = pg_b64_encode((const void *) digest, sizeof(digest), result + 3, pg_b64_enc_len(sizeof(digest)));
	if (n < 0)
		elog(ERROR, "could not encode a signature");
	result[3 + n] = '\0';
	return result;
}

/*
 * Return text of the server's encoding as UTF-8, and its length in *len, which
 * is that of the text before; palloc'd, or the text itself.
 *
 * What is not valid becomes "?".  Where the server does not know its encoding
 * (SQL_ASCII) bytes are as they are.  Unless it is UTF-8, needs a transaction.
 */
char *
redrive_to_utf8(char *text, size_t *len)
{
	const int	encoding = GetDatabaseEncoding();
	Oid			conversion = InvalidOid;
	size_t		room = *len * MAX_CONVERSION_GROWTH + 1;
	char	   *result;
	size_t		at = 0;

	if (encoding != PG_UTF8 && encoding != PG_SQL_ASCII)
		conversion = FindDefaultConversionProc(encoding, PG_UTF8);
	if (!OidIsValid(conversion))
		return text;
	result = MemoryContextAllocHuge(CurrentMemoryContext, room);
	for (size_t i = 0; i < *len;)
	{
		i += pg_do_encoding_conversion_buf(conversion, encoding, PG_UTF8, (unsigned char *) text + i, *len - i,
										   (unsigned char *) result + at, room - at, true);
		at += strlen(result + at);
		if (i < *len)
		{
			result[at++] = '?';
			i += Min((size_t) pg_encoding_mblen(encoding, text + i), *len - i);
		}
	}
	*len = at;
	return result;
}

/*
 * Return bytes that came from outside as text of the server's encoding, palloc'd.
 *
 * At most so many bytes of it, to the first NUL; what is not valid becomes "?".
 * The bytes are taken for UTF-8.
 */
char *
redrive_clean_text(const char *bytes, size_t len, size_t most)
{
	StringInfoData buf;
	size_t		end = Min(strnlen(bytes, len), most);

	initStringInfo(&buf);
	for (size_t i = 0; i < end;)
	{
		int			n = pg_utf_mblen((const unsigned char *) bytes + i);

		if (i + n <= end && pg_utf8_islegal((const unsigned char *) bytes + i, n))
		{
			appendBinaryStringInfo(&buf, bytes + i, n);
			i += n;
		}
		else
		{
			/* a character that was cut at the end is left out */
			if (end == len || i + n <= end || end < most)
				appendStringInfoChar(&buf, '?');
			i++;
		}
	}
	if (GetDatabaseEncoding() == PG_UTF8)
		return buf.data;

	/*
	 * what the server's encoding does not have becomes "?", character by
	 * character
	 */
	{
		StringInfoData out;

		initStringInfo(&out);
		for (int i = 0; i < buf.len;)
		{
			int			n = pg_utf_mblen((const unsigned char *) buf.data + i);

			appendStringInfoChar(&out, n == 1 ? buf.data[i] : '?');
			i += n;
		}
		return out.data;
	}
}

/* SQL: _check_url(url, allow_http) */
Datum
redrive__check_url(PG_FUNCTION_ARGS)
{
	redrive_check_url(text_to_cstring(PG_GETARG_TEXT_PP(0)), PG_GETARG_BOOL(1));
	PG_RETURN_VOID();
}

/* SQL: _unlisted_port(url), NULL = its port is listed */
Datum
redrive__unlisted_port(PG_FUNCTION_ARGS)
{
	CURLU	   *parts = curl_url();
	char	   *port = NULL;
	int			number = 0;

	if (parts != NULL && curl_url_set(parts, CURLUPART_URL, text_to_cstring(PG_GETARG_TEXT_PP(0)), 0) == CURLUE_OK &&
		curl_url_get(parts, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT) == CURLUE_OK)
		number = atoi(port);
	curl_free(port);
	curl_url_cleanup(parts);
	if (redrive_port_listed(number))
		PG_RETURN_NULL();
	PG_RETURN_INT32(number);
}

/* SQL: _check_headers(headers) */
Datum
redrive__check_headers(PG_FUNCTION_ARGS)
{
	(void) redrive_check_headers(PG_GETARG_DATUM(0), false, 0);
	PG_RETURN_VOID();
}
