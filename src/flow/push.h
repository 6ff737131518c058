/*-------------------------------------------------------------------------
 *
 * push.h
 *	  Pushes: platforms as the pusher knows them, claims, results, records.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_PUSH_H
#define REDRIVE_PUSH_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/ilist.h"
#include "nodes/pg_list.h"

#include "base/http.h"

/* How much of an answer is kept in the log. */
#define REDRIVE_KEPT_ANSWER 4096

/* The pause after an error of ours. */
#define REDRIVE_AFTER_ERROR_MS 1000

typedef enum BreakerState
{
	BREAKER_CLOSED,				/* requests are sent -> OPEN */
	BREAKER_OPEN,				/* none are, until blocked_until -> HALF_OPEN */
	BREAKER_HALF_OPEN			/* a few probes are -> CLOSED, OPEN */
} BreakerState;

/* A role that has platforms. */
typedef struct PushOwner
{
	Oid			role;
	int			in_flight;		/* requests to all its platforms */
	int			room;			/* how many more there may be */
	bool		had_turn;		/* one of them was sent in this round */
} PushOwner;

/* A platform: its configuration, and what the pusher has learned about it. */
typedef struct Platform
{
	int32		platform_id;
	PushOwner  *owner;
	MemoryContext cxt;			/* of its configuration */
	char	   *name;
	int64		config_version;
	bool		paused;
	bool		has_build;
	Datum		success_when;	/* a jsonpath, 0 = none */
	const char *trouble;		/* why nothing can be sent, or NULL */

	/* what requests are made of */
	char	   *method;
	char	   *url;
	const char **headers;		/* with room for ours at the end */
	int			n_headers;
	char	   *signing[2];		/* keys, or NULL */
	List	   *hidden;			/* strings that are not kept of an answer */
	RedriveAddressRange *allow;
	int			n_allow;
	int			timeout_ms;
	int			connect_timeout_ms;
	bool		allow_http;
	int		   *permanent;		/* statuses that are not retried */
	int			n_permanent;
	double		retry_interval_s;
	int			max_retries;

	/* limits */
	int			max_in_flight;
	double		rate_limit;		/* per second, 0 = none */
	double		tokens;			/* requests that may be sent now */
	TimestampTz tokens_at;
	dlist_head	claimed;		/* pushes that are not recorded */
	int			n_claimed;
	struct Push *prefetched;	/* those of them that wait for room, the first
								 * comes first */
	struct Push *last_prefetched;
	int			n_prefetched;
	TimestampTz pace_since;		/* of this short time answers are counted */
	int			answers;
	int			pace;			/* how many came in the one before */
	int			body_size;		/* of what was claimed lately, roughly */
	int			in_flight;
	int			ended;			/* results that are not recorded */
	int			limit;			/* at the moment: grows with successes */

	/* circuit breaker; rows of platform_states are copies of this */
	BreakerState breaker;
	char		reason[120];
	TimestampTz opened_at;
	TimestampTz blocked_until;
	int			times_opened;
	int			failures_in_row;
	int			successes_in_row;
	TimestampTz answered_at;	/* last sign of life that was not used up */
	TimestampTz window_started_at;
	int64		window_attempts;
	int64		window_failures;
	int64		new_attempts;	/* since it was written down */
	int64		new_delivered;
	bool		changed;		/* has to be written down */
	bool		written;		/* and was, in this transaction */
	bool		gone;			/* answered 410: to be paused */
	bool		more_due;		/* there may be something to claim */
	bool		alone;			/* a claim failed: one push, and no other
								 * platform's */
	int			asked;			/* how many the claim asked for, less what it
								 * got */
	int			share;			/* how many may be under way, for others need
								 * room */
	TimestampTz ready_at;		/* when it may be claimed for */
} Platform;

/* Pushes of a platform that were claimed at once: a row of push_claims. */
typedef struct PushClaim
{
	int64		claim_id;		/* the fence */
	int			left;			/* pushes that are not recorded */
	int			ending;			/* those that are being recorded */
} PushClaim;

/* One push that is under way, then its result. */
typedef struct Push
{
	dlist_node	node;			/* in its platform's list of what is claimed */
	struct Push *next;			/* in the list of results, or of what is
								 * prefetched */
	PushClaim  *claim;
	MemoryContext texts;		/* of a result that was held, or NULL */
	int64		push_id;
	int64		version;
	Platform   *platform;
	bool		is_probe;
	char	   *id;				/* webhook-id; until it is sent */
	char	   *body;			/* so, too; NULL = it is too long */
	TimestampTz started_at;		/* claimed, then committed, then sent */

	TimestampTz finished_at;
	int64		config_version; /* of its platform, when it was claimed */
	bool		recorded;		/* by the transaction that is open */
	bool		given_back;		/* nothing was sent; no attempt is counted */
	bool		delivered;
	bool		charged;		/* costs a retry */
	bool		permanent;		/* is not retried */
	bool		blocked;		/* not before the configuration changes */
	bool		taught;			/* its platform has learned from it */
	int			wait_ms;		/* the least time to the next attempt */
	const char *error_class;	/* NULL = none */
	int			status;
	int			failure_code;
	const char *message;		/* NULL = none */
	char	   *response;		/* what is kept of the answer, or NULL */
	char	   *answer;			/* all of it, if it is JSON and success_when
								 * is still to be asked about it */
} Push;

/* push.c */
extern List *redrive_load_platforms(List *known, MemoryContext cxt);
extern int64 redrive_platforms_version(void);
extern List *redrive_claim_pushes(List *platforms, Platform *alone, int room, int64 pusher, bool *outdated);
extern bool redrive_block_next_push(Platform *platform, const char *message);
extern void redrive_write_platforms(List *platforms);
extern void redrive_platforms_are_written(List *platforms);
extern TimestampTz redrive_next_push(List *platforms, List *claimed);
extern int	redrive_share_out(List *platforms);
extern void redrive_look_at_all(List *platforms);
extern bool redrive_reap_pushes(int64 pusher);
extern void redrive_keep_claimed(List *claimed, MemoryContext cxt);
extern void redrive_forget_pushes(Push **pushes, int n);

/* push_send.c */
extern TimestampTz redrive_send_pushes(RedriveHttp *http, List *platforms, List *claimed, MemoryContext cxt);
extern TimestampTz redrive_send_prefetched(RedriveHttp *http, List *platforms);
extern void redrive_give_back_prefetched(List *platforms);
extern void redrive_give_back_push(void *arg);

/* push_judge.c */
extern bool redrive_judge_answers(Push **pushes, int n);

/* push_record.c */
extern void redrive_record_pushes(Push **pushes, int n, bool without_answers);

/* push_held.c */
extern void redrive_add_result(Push *push);
extern TimestampTz redrive_results_due(TimestampTz now);
extern Push **redrive_results(int *n);
extern void redrive_clear_results(List *platforms);
extern int	redrive_put_locked_last(Push **pushes, int n);
extern void redrive_limit_lock_wait(void);
extern void redrive_record_apart(Push **pushes, int n, bool without_answers, MemoryContext cxt);
extern bool redrive_is_outage(int sqlstate);
extern void redrive_hold_push(Push *push, MemoryContext cxt);
extern TimestampTz redrive_held_until(void);
extern void redrive_take_held(void);

/* push_result.c */
extern void redrive_judge_push(Push *push, const RedriveHttpResult *http);
extern void redrive_teach_platform(Push *push);
extern int	redrive_most_at_once(Platform *platform);
extern int	redrive_prefetch_of(Platform *platform, TimestampTz now);
extern int	redrive_room_of(Platform *platform, TimestampTz now);
extern TimestampTz redrive_platform_ready_at(Platform *platform, TimestampTz now);

#endif							/* REDRIVE_PUSH_H */
