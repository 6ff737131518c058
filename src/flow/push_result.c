/*-------------------------------------------------------------------------
 *
 * push_result.c
 *	  What an attempt to push means: for its push, and for its platform.
 *
 * A platform that is down, slow or asks us to wait must not cost its pushes
 * their retries: the breaker opens, and they wait without spending anything.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "common/jsonapi.h"
#include "mb/pg_wchar.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "flow/push.h"

#define FIRST_LIMIT 4
#define FEWEST_IN_ROW 2			/* failures that open a breaker */
#define MOST_IN_ROW 5
#define WINDOW_US INT64CONST(300000000)
#define WINDOW_ATTEMPTS 10
#define WINDOW_SHARE 0.7
#define OPEN_US INT64CONST(30000000)
#define OPEN_MAX_US INT64CONST(900000000)
#define PROBES 2
#define MAX_WAIT_S 3600			/* the longest that a platform can ask for */
#define OUR_FAULT_MS 2000
#define PACE_US INT64CONST(20000)	/* what is answered in this time is
									 * prefetched */
#define MOST_PREFETCHED 256
#define PREFETCHED_BYTES 4194304

/* Is this text JSON that has a chance to become jsonb?  What is nested too deeply is not. */
static bool
is_json(char *text)
{
	static JsonSemAction nothing;
	MemoryContext old_cxt = CurrentMemoryContext;
	volatile bool valid = false;

	PG_TRY();
	{
		valid = pg_parse_json(redrive_json_lexer(text), &nothing) == JSON_SUCCESS;
	}
	PG_CATCH();
	{
		if (geterrcode() != ERRCODE_STATEMENT_TOO_COMPLEX)
			PG_RE_THROW();
		MemoryContextSwitchTo(old_cxt);
		FlushErrorState();
	}
	PG_END_TRY();
	return valid;
}

static void
fail(Push *push, const char *error_class, bool charged)
{
	push->error_class = error_class;
	push->charged = charged;
}

/* How long a platform wants to be left alone, in ms; never shorter than it is set to. */
static int
wait_of(Push *push, const RedriveHttpResult *http)
{
	return (int) Min(Max(push->platform->retry_interval_s, Min(http->retry_after_s, MAX_WAIT_S)), INT_MAX / 1000) * 1000;
}

/* Judge an answer by its status. */
static void
judge_status(Push *push, const RedriveHttpResult *http)
{
	Platform   *platform = push->platform;
	const int	status = http->status;

	push->message = psprintf("The answer was %d.", status);
	if (status >= 200 && status < 300)
	{
		push->delivered = true;
		push->message = NULL;
		if (platform->success_when != (Datum) 0)
		{
			char	   *answer = http->truncated ? NULL : redrive_clean_text(http->body, http->body_len, http->body_len);

			/* the rest is judged before it is recorded */
			if (answer == NULL || !is_json(answer))
			{
				push->delivered = false;
				push->message = http->truncated ? "The answer is too long." : "The answer is not JSON.";
				fail(push, "rejected", true);
			}
			else
				push->answer = answer;
		}
		return;
	}
	for (int i = 0; i < platform->n_permanent; i++)
		if (platform->permanent[i] == status)
			push->permanent = true;
	if (status == 429 || (status == 503 && http->retry_after_s > 0))
	{
		fail(push, "throttled", false);
		push->wait_ms = wait_of(push, http);
	}
	else if (status == 401 || status == 403 || status == 407)
		fail(push, "credential", false);
	else if (status == 410)
		fail(push, "gone", false);
	else if (status >= 300 && status < 400)
		fail(push, "redirect", true);
	else if (status == 408 || status == 425 || status >= 500 || status < 200)
	{
		fail(push, "transient", true);
		if (http->retry_after_s > 0)
			push->wait_ms = wait_of(push, http);
	}
	else
		fail(push, "client_error", true);
}

/* Open the breaker of a platform for a time. */
static void
open_breaker(Platform *platform, TimestampTz now, int64 wait_us, const char *reason)
{
	platform->breaker = BREAKER_OPEN;
	platform->opened_at = now;
	platform->blocked_until = now + wait_us;
	platform->successes_in_row = 0;
	platform->limit = FIRST_LIMIT;
	strlcpy(platform->reason, reason, sizeof(platform->reason));
}

static void
close_breaker(Platform *platform)
{
	platform->breaker = BREAKER_CLOSED;
	platform->blocked_until = 0;
	platform->opened_at = 0;
	platform->times_opened = 0;
	platform->failures_in_row = 0;
	platform->window_attempts = 0;
	platform->window_failures = 0;
	platform->reason[0] = '\0';
}

/*
 * How many failures in a row open the breaker: as many as a push has retries, lest those of
 * a platform with few pushes be used up before.
 */
static int
most_failures(Platform *platform)
{
	return Min(Max(platform->max_retries, FEWEST_IN_ROW), MOST_IN_ROW);
}

/* How long the breaker stays open now: longer each time in a row. */
static int64
open_time(Platform *platform)
{
	int64		time = OPEN_US << Min(platform->times_opened, 10);

	platform->times_opened++;
	return Min(time, OPEN_MAX_US);
}

/*
 * Let the platform's breaker and limits learn from a result, once.
 *
 * A probe costs its push nothing, as it is about the platform; unless the platform has
 * answered another since its breaker opened: then it is the push that fails, and
 * nobody else has to wait for it.  Says so in the log when the breaker opens or
 * closes; nothing of the request is in there.
 */
void
redrive_teach_platform(Push *push)
{
	Platform   *platform = push->platform;
	const char *class = push->error_class;
	const TimestampTz now = push->finished_at;
	const BreakerState before = platform->breaker;

	/* errors of ours, and those of a single task, say nothing about it */
	const bool	ours = class != NULL && (strcmp(class, "ours") == 0 || strcmp(class, "policy") == 0);
	const bool	answered = push->delivered || (class != NULL && strcmp(class, "client_error") == 0);
	const bool	lives = before != BREAKER_CLOSED && platform->answered_at > platform->opened_at;
	const bool	hard = class != NULL && (strcmp(class, "not_sent") == 0 || strcmp(class, "timeout") == 0 || strcmp(class, "tls") == 0 ||
										 strcmp(class, "credential") == 0);

	if (push->taught)
		return;
	push->taught = true;
	if (push->is_probe && !push->delivered)
	{
		push->charged = !ours && (answered || lives) && strcmp(class, "throttled") != 0 && strcmp(class, "gone") != 0;
		/* each sign of life tells against one push only */
		if (push->charged && !answered)
			platform->answered_at = 0;
	}
	platform->changed = true;
	platform->new_attempts++;
	if (push->delivered)
		platform->new_delivered++;
	/* nor does an answer to what the platform was before it was altered */
	if (ours || push->config_version != platform->config_version)
		return;
	if (answered)
	{
		platform->answered_at = now;
		platform->successes_in_row++;
		if (platform->breaker != BREAKER_CLOSED && platform->successes_in_row >= PROBES)
			close_breaker(platform);
	}
	if (answered && !push->delivered)
		return;
	if (platform->window_started_at == 0 || now - platform->window_started_at > WINDOW_US)
	{
		platform->window_started_at = now;
		platform->window_attempts = 0;
		platform->window_failures = 0;
	}
	platform->window_attempts++;
	if (push->delivered)
	{
		platform->limit = Min(platform->limit + 1, platform->max_in_flight);
		platform->failures_in_row = 0;
	}
	else
	{
		platform->window_failures++;
		platform->successes_in_row = 0;
		platform->failures_in_row = hard ? platform->failures_in_row + 1 : platform->failures_in_row;
		if (hard || strcmp(class, "throttled") == 0)
			platform->limit = Max(platform->limit / 2, 1);
		if (strcmp(class, "gone") == 0)
		{
			platform->gone = true;
			strlcpy(platform->reason, "it answered 410: it wants no more pushes", sizeof(platform->reason));
		}
		else if (strcmp(class, "throttled") == 0)
			open_breaker(platform, now, Max(push->wait_ms * INT64CONST(1000), (int64) 1000000), "it asked to wait");
		else if (platform->breaker == BREAKER_OPEN)
			;					/* a late result of before */
		else if (platform->breaker == BREAKER_HALF_OPEN && push->charged)
			;					/* it is this push, not the platform */
		else if (platform->breaker == BREAKER_HALF_OPEN)
			open_breaker(platform, now, open_time(platform), psprintf("a probe failed: %s", class));
		else if (strcmp(class, "credential") == 0 || strcmp(class, "tls") == 0)
			open_breaker(platform, now, open_time(platform), psprintf("%s: %s", class, push->message != NULL ? push->message : ""));
		else if (platform->failures_in_row >= most_failures(platform))
			open_breaker(platform, now, open_time(platform), psprintf("%d failures in a row: %s", platform->failures_in_row, class));
		else if (platform->window_attempts >= WINDOW_ATTEMPTS && platform->window_failures >= WINDOW_SHARE * platform->window_attempts)
			open_breaker(platform, now, open_time(platform), psprintf("%lld of %lld attempts failed: %s", (long long) platform->window_failures,
																	  (long long) platform->window_attempts, class));
	}
	if (before == BREAKER_CLOSED && platform->breaker == BREAKER_OPEN)
		ereport(LOG, (errmsg("pg_redrive stops pushing to platform \"%s\" for a while", platform->name),
					  errdetail("Reason: %s.", platform->reason)));
	else if (before != BREAKER_CLOSED && platform->breaker == BREAKER_CLOSED)
		ereport(LOG, (errmsg("pg_redrive pushes to platform \"%s\" again", platform->name)));
}

/*
 * How much of the start of a text is this secret, as it is or as it may stand in JSON?
 * There are encoders that escape slashes, or everything.  0 if it is something else.
 */
static size_t
secret_length(const char *text, const char *secret)
{
	const char *t = text;

	if (strncmp(text, secret, strlen(secret)) == 0)
		return strlen(secret);
	for (const char *s = secret; *s != '\0'; s++)
	{
		char		code[] = "\\u0000";

		if (t[0] == '\\' && t[1] == 'u')
		{
			snprintf(code, sizeof(code), "\\u%04x", *s);
			if (pg_strncasecmp(t, code, strlen(code)) != 0)
				return 0;
			t += strlen(code);
			continue;
		}
		if (t[0] == '\\')
			t++;
		if (*t++ != *s)
			return 0;
	}
	return t - text;
}

/*
 * Return what is kept of an answer.  There are platforms that repeat in it what
 * they were sent: secrets are blotted out, before it is cut.
 */
static char *
kept_answer(Platform *platform, const RedriveHttpResult *http)
{
	char	   *text = redrive_clean_text(http->body, http->body_len, http->body_len);
	ListCell   *lc;

	foreach(lc, platform->hidden)
	{
		const char *secret = lfirst(lc);
		const char	starts[] = {secret[0], '\\', '\0'};

		for (char *c = text; (c = strpbrk(c, starts)) != NULL; c++)
			memset(c, '*', secret_length(c, secret));
	}
	if (strlen(text) > REDRIVE_KEPT_ANSWER)
		text[pg_mbcliplen(text, strlen(text), REDRIVE_KEPT_ANSWER)] = '\0';
	return text;
}

/* Count an answer: how quick is the platform? */
static void
note_pace(Platform *platform, TimestampTz now)
{
	const TimestampTz passed = now - platform->pace_since;

	if (passed >= PACE_US)
	{
		platform->pace = passed < 2 * PACE_US ? platform->answers : 0;
		platform->pace_since = now;
		platform->answers = 0;
	}
	platform->answers++;
}

/*
 * Say what came of an attempt.
 *
 * Strings are palloc'd in the current context.
 */
void
redrive_judge_push(Push *push, const RedriveHttpResult *http)
{
	push->finished_at = GetCurrentTimestamp();
	push->status = http->status;
	push->failure_code = http->failure_code;
	if (http->body_len > 0)
		push->response = kept_answer(push->platform, http);
	if (http->failure_code == 0)
	{
		note_pace(push->platform, push->finished_at);
		judge_status(push, http);
	}
	else
	{
		push->message = redrive_clean_text(http->error, strlen(http->error), sizeof(http->error));
		if (http->refused)
		{
			fail(push, "policy", false);
			push->blocked = true;
		}
		else if (http->ours)
		{
			fail(push, "ours", false);
			push->wait_ms = OUR_FAULT_MS;
			push->platform->limit = Max(push->platform->limit / 2, 1);
		}
		else if (http->tls)
			fail(push, "tls", false);
		else if (http->timed_out)
			fail(push, "timeout", true);
		else
			fail(push, http->sent ? "ambiguous" : "not_sent", true);
	}
	/* what success_when has to be asked about is not known yet */
	if (push->answer == NULL)
		redrive_teach_platform(push);
}

/* How many requests to a platform may be under way. */
int
redrive_most_at_once(Platform *platform)
{
	return Min(Min(platform->limit, platform->share), platform->max_in_flight);
}

/*
 * How many more than that may be claimed for a platform: what it is going to answer soon.
 *
 * None where each result may be the last for a while: in all these cases a push that is claimed is
 * sent at once.  What success_when says is known only when results are recorded.
 */
int
redrive_prefetch_of(Platform *platform, TimestampTz now)
{
	if (platform->breaker != BREAKER_CLOSED || platform->failures_in_row > 0 || platform->rate_limit > 0 || platform->success_when != (Datum) 0 ||
		now - platform->pace_since > 2 * PACE_US)
		return 0;
	return Min(Min(platform->pace, MOST_PREFETCHED), PREFETCHED_BYTES / Max(platform->body_size, 1));
}

/* How many more pushes may be claimed for a platform now. */
int
redrive_room_of(Platform *platform, TimestampTz now)
{
	int			room = redrive_most_at_once(platform) - platform->in_flight;

	if (platform->paused || platform->gone || platform->trouble != NULL)
		return 0;
	if (platform->breaker == BREAKER_OPEN && now >= platform->blocked_until)
	{
		platform->breaker = BREAKER_HALF_OPEN;
		platform->successes_in_row = 0;
		platform->changed = true;
		platform->more_due = true;
	}
	if (platform->breaker == BREAKER_OPEN)
		return 0;
	if (platform->breaker == BREAKER_HALF_OPEN)
		room = Min(room, PROBES - platform->in_flight);
	if (platform->rate_limit > 0)
	{
		const double most = Max(platform->rate_limit / 10, 1);

		if (platform->tokens_at != 0)
			platform->tokens += platform->rate_limit * (now - platform->tokens_at) / 1e6;
		else
			platform->tokens = most;
		platform->tokens = Min(platform->tokens, most);
		platform->tokens_at = now;
		room = Min(room, (int) platform->tokens);
	}
	room += redrive_prefetch_of(platform, now) - platform->n_prefetched;
	return Max(room, 0);
}

/* When it is worth looking at a platform that has something due; 0 = now. */
TimestampTz
redrive_platform_ready_at(Platform *platform, TimestampTz now)
{
	if (platform->paused || platform->gone || platform->trouble != NULL)
		return DT_NOEND;
	if (platform->breaker == BREAKER_OPEN)
		return platform->blocked_until;
	if (platform->breaker == BREAKER_HALF_OPEN && platform->in_flight > 0)
		return DT_NOEND;		/* its results will tell */
	if (platform->in_flight >= redrive_most_at_once(platform))
		return DT_NOEND;
	if (platform->rate_limit > 0 && platform->tokens < 1)
		return now + (TimestampTz) (Min((1 - platform->tokens) / platform->rate_limit, MAX_WAIT_S) * 1e6) + 1000;
	return 0;
}
