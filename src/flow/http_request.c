/*-------------------------------------------------------------------------
 *
 * http_request.c
 *	  One HTTP request from SQL, tried a bounded number of times.
 *
 * What the network does is an answer, not an error; only bad arguments raise.
 * While it waits it can be cancelled.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "portability/instr_time.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/http.h"
#include "base/spi_call.h"
#include "base/xact.h"

#define MAX_ATTEMPTS 100
#define MAX_TIME_MS 3600000
#define MAX_RANGES 100

PG_FUNCTION_INFO_V1(redrive_http_request);

/* What came of a request. */
typedef struct Outcome
{
	bool		ok;
	int			status;			/* 0 = no answer */
	int			attempts;
	char	   *answer;
	char	   *error;			/* NULL = none */
} Outcome;

static RedriveSql log_request = {
	"INSERT INTO redrive.http_log (requested_at, requested_by, method, host, ok, http_status, attempts, milliseconds, error)"
	" VALUES ($1, $2, $3::redrive.http_method, $4, $5, nullif($6, 0), $7, $8, $9)",
	9, {TIMESTAMPTZOID, OIDOID, TEXTOID, TEXTOID, BOOLOID, INT4OID, INT4OID, FLOAT8OID, TEXTOID}
};

static void
bad_argument(const char *name, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for \"%s\"", name),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* Return an interval argument in milliseconds, checked. */
static int
milliseconds(FunctionCallInfo fcinfo, int arg, const char *name, int least)
{
	Interval   *interval = PG_GETARG_INTERVAL_P(arg);
	double		ms = interval->time / 1000.0 + (interval->day + interval->month * (double) DAYS_PER_MONTH) * SECS_PER_DAY * 1000.0;

	if (ms < least || ms > MAX_TIME_MS)
		bad_argument(name, psprintf("It is %g ms.", ms), psprintf("Give a time from %d ms to 1 hour.", least));
	return (int) ms;
}

/* Wait for one request, without a way to block interrupts. */
static void
await(RedriveHttp *http, WaitEventSet *set, RedriveHttpResult *result)
{
	while (!redrive_http_next_result(http, result))
	{
		WaitEvent	event;
		long		ms = redrive_http_timeout_ms(http);

		if (WaitEventSetWait(set, ms, &event, 1, redrive_wait_event("RedriveHttpRequest")) > 0 && (event.events & WL_LATCH_SET))
			ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		redrive_http_drive(http);
	}
}

/* Is it worth trying again? */
static bool
is_temporary(const RedriveHttpResult *result)
{
	if (result->failure_code != 0)
		return !result->refused && !result->tls;
	return result->status == 408 || result->status == 425 || result->status == 429 || result->status >= 500;
}

/* Send a request until it succeeds or there is no point in trying again. */
static void
send_request(const RedriveHttpRequest *request, int max_attempts, int delay_ms, Outcome *outcome)
{
	RedriveHttp *http = redrive_http_create(1);
	WaitEventSet *volatile set = NULL;

	PG_TRY();
	{
		set = redrive_wait_set(3);
		AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
		AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
		AddWaitEventToSet(set, WL_SOCKET_READABLE, redrive_http_fd(http), NULL, NULL);
		for (;;)
		{
			RedriveHttpResult result;
			bool		again;
			long		wait_ms;

			outcome->attempts++;
			if (!redrive_http_start(http, request))
				ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
			await(http, set, &result);
			outcome->status = result.status;
			outcome->ok = result.failure_code == 0 && result.status >= 200 && result.status < 300;
			outcome->answer = redrive_clean_text(result.body, result.body_len, result.body_len);
			outcome->error = outcome->ok ? NULL :
				result.failure_code != 0 ? pstrdup(result.error) : psprintf("the answer was %d", result.status);
			again = !outcome->ok && is_temporary(&result) && outcome->attempts < max_attempts;
			wait_ms = Max(delay_ms, Min(result.retry_after_s, 60) * 1000L);
			redrive_http_free_result(&result);
			if (!again)
				break;
			for (TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), wait_ms); wait_ms > 0;
				 wait_ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end))
			{
				(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, wait_ms, redrive_wait_event("RedriveHttpRequest"));
				ResetLatch(MyLatch);
				CHECK_FOR_INTERRUPTS();
			}
		}
	}
	PG_FINALLY();
	{
		if (set != NULL)
			FreeWaitEventSet(set);
		redrive_http_destroy(http);
	}
	PG_END_TRY();
}

/*
 * SQL: http_request(method, url, body, headers, max_attempts, timeout, retry_delay)
 *
 * Private networks are closed but for redrive.http_allow_cidr, and only those
 * are open for http without TLS.
 */
Datum
redrive_http_request(PG_FUNCTION_ARGS)
{
	static const char *const names[] = {"method", "url", "body", "headers", "max_attempts", "timeout", "retry_delay"};
	static const char *const methods[] = {"GET", "POST", "PUT", "PATCH", "DELETE"};
	char	   *method = NULL;
	char	   *url;
	char	   *host;
	text	   *body = PG_ARGISNULL(2) ? NULL : PG_GETARG_TEXT_PP(2);
	int			max_attempts;
	int			timeout_ms;
	int			delay_ms;
	const char **headers;
	RedriveAddressRange ranges[MAX_RANGES];
	RedriveHttpRequest request = {0};
	TimestampTz started_at = GetCurrentTimestamp();
	Outcome		outcome = {0};
	List	   *list;
	ListCell   *lc;
	TupleDesc	tupdesc;
	Datum		values[9];
	bool		nulls[9] = {false};
	char		sql_nulls[10] = "         ";

	redrive_require_writable(fcinfo);	/* for the log */
	for (int i = 0; i < lengthof(names); i++)
		if (PG_ARGISNULL(i) && i != 2)
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("%s must not be null", names[i]),
					 errhint("Give a method and a URL; the other arguments can be left out.")));
	for (int i = 0; i < lengthof(methods); i++)
		if (pg_strcasecmp(text_to_cstring(PG_GETARG_TEXT_PP(0)), methods[i]) == 0)
			method = pstrdup(methods[i]);
	if (method == NULL)
		bad_argument("method", "It is not known.", "Valid methods are: GET, POST, PUT, PATCH, DELETE.");
	url = text_to_cstring(PG_GETARG_TEXT_PP(1));
	redrive_check_url(url, true);
	host = redrive_url_host(url);
	if (host == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	if (body != NULL)
	{
		request.body_len = VARSIZE_ANY_EXHDR(body);
		request.body = redrive_to_utf8(VARDATA_ANY(body), &request.body_len);
		if (request.body_len > REDRIVE_HTTP_MAX_BODY)
			bad_argument("body", psprintf("It has %zu bytes.", request.body_len), "It may have 1 MB at most.");
	}
	headers = redrive_check_headers(PG_GETARG_DATUM(3), true, 1);
	max_attempts = PG_GETARG_INT32(4);
	if (max_attempts < 1 || max_attempts > MAX_ATTEMPTS)
		bad_argument("max_attempts", psprintf("It is %d.", max_attempts), psprintf("Give 1 to %d.", MAX_ATTEMPTS));
	timeout_ms = milliseconds(fcinfo, 5, "timeout", 1);
	delay_ms = milliseconds(fcinfo, 6, "retry_delay", 0);

	/* the setting was checked when it was made */
	(void) SplitGUCList(pstrdup(redrive_http_allow_cidr), ',', &list);
	foreach(lc, list)
		if (request.n_allow < MAX_RANGES && redrive_parse_range(lfirst(lc), &ranges[request.n_allow]))
		request.n_allow++;
	request.method = method;
	request.url = url;
	request.headers = headers;
	request.timeout_ms = timeout_ms;
	request.connect_timeout_ms = timeout_ms;
	request.allow_http = true;
	request.allow_only = pg_strncasecmp(url, "https:", 6) != 0;
	request.allow = ranges;

	send_request(&request, max_attempts, delay_ms, &outcome);

	redrive_connect();
	values[0] = TimestampTzGetDatum(started_at);
	values[1] = ObjectIdGetDatum(GetUserId());
	values[2] = CStringGetTextDatum(method);
	values[3] = CStringGetTextDatum(host);
	values[4] = BoolGetDatum(outcome.ok);
	values[5] = Int32GetDatum(outcome.status);
	values[6] = Int32GetDatum(outcome.attempts);
	values[7] = Float8GetDatum((GetCurrentTimestamp() - started_at) / 1000.0);
	values[8] = outcome.error != NULL ? CStringGetTextDatum(outcome.error) : (Datum) 0;
	sql_nulls[8] = outcome.error != NULL ? ' ' : 'n';
	(void) redrive_sql(&log_request, values, sql_nulls);
	redrive_disconnect();

	(void) get_call_result_type(fcinfo, NULL, &tupdesc);
	tupdesc = BlessTupleDesc(tupdesc);
	values[0] = BoolGetDatum(outcome.ok);
	values[1] = Int32GetDatum(outcome.status);
	nulls[1] = outcome.status == 0;
	nulls[2] = outcome.status == 0;
	values[2] = nulls[2] ? (Datum) 0 : CStringGetTextDatum(outcome.answer);
	values[3] = Int32GetDatum(outcome.attempts);
	nulls[4] = outcome.error == NULL;
	values[4] = outcome.error != NULL ? CStringGetTextDatum(outcome.error) : (Datum) 0;
	return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
}
