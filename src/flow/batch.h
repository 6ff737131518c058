/*-------------------------------------------------------------------------
 *
 * batch.h
 *	  The things of the flow: handlers, chunks, items, failures.
 *
 * States are spelled as in the SQL types.  Who may move what is drawn in
 * src/README.md.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_BATCH_H
#define REDRIVE_BATCH_H

#include "datatype/timestamp.h"
#include "fmgr.h"
#include "nodes/pg_list.h"

#include "base/shmem.h"

/* SQLSTATEs of our own */
#define ERRCODE_REDRIVE_VALIDATION	MAKE_SQLSTATE('R','D','0','0','1')
#define ERRCODE_REDRIVE_USER_ERROR	MAKE_SQLSTATE('R','D','0','0','2')
#define ERRCODE_REDRIVE_FENCED		MAKE_SQLSTATE('R','D','0','0','3')
#define ERRCODE_REDRIVE_BAD_OUTCOME	MAKE_SQLSTATE('R','D','0','0','5')

/* A commit interval has no more items; sql/32_crash.sql knows it too. */
#define MAX_INTERVAL_ITEMS 2000

typedef enum RuleAction
{
	ACTION_IGNORE,
	ACTION_FAIL,
	ACTION_RETRY,
	ACTION_RETRY_FREE,
	ACTION_PAUSE
} RuleAction;

typedef enum HandlerSignature
{
	SIGNATURE_PAYLOAD,			/* (payload jsonb) */
	SIGNATURE_KEY_PAYLOAD,		/* (key text, payload jsonb) */
	SIGNATURE_ITEM,				/* (item redrive.item) */
	SIGNATURE_ITEMS				/* (items redrive.item[]): a set handler */
} HandlerSignature;

/* What became of an item, in the words of its handler. */
typedef enum OutcomeKind
{
	OUTCOME_OK,
	OUTCOME_IGNORED,
	OUTCOME_FAILED,
	OUTCOME_RETRY,
	OUTCOME_SNOOZED
} OutcomeKind;

typedef struct RedriveOutcome
{
	int			index;			/* of the item, in the page */
	OutcomeKind kind;
	char	   *message;		/* NULL = none given */
	char	   *code;			/* NULL = none given */
	Interval   *delay;			/* NULL = none given */
} RedriveOutcome;

/* A handler as one chunk sees it; read once per claim. */
typedef struct RedriveHandler
{
	int32		handler_id;
	char	   *name;
	char	   *function;		/* schema-qualified */
	HandlerSignature signature;
	int32		max_retries;
	int64		retry_delay;	/* microseconds, -1 = wait for the pass */
	double		retry_factor;
	int64		retry_delay_max;	/* microseconds */
	int64		item_timeout;	/* microseconds, 0 = none */
	int64		commit_interval;	/* microseconds */
	bool		one_by_one;		/* isolation = item */
	char	   *on_unlock;		/* schema-qualified, or NULL */
} RedriveHandler;

/* Why an item did not succeed, and what follows. */
typedef struct RedriveFailure
{
	struct RedriveItem *item;
	RuleAction	action;
	int32		rule_id;
	const char *error_class;
	const char *state;			/* failure_state it gets */
	const char *reason;			/* fail_reason, or NULL */
	int32		attempts;		/* made, this one included */
	int32		free_count;		/* of them, those that cost no retry */
	int32		retry_count;	/* paid attempts less the first */
	TimestampTz failed_at;
	TimestampTz next_attempt_at;	/* 0 = none */
	uint64		fingerprint;
	const char *code;			/* stands for the SQLSTATE, NULL = it does not */
	ErrorData  *error;
} RedriveFailure;

typedef struct RedriveItem
{
	int64		item_no;
	text	   *key;			/* NULL = none */
	Datum		payload;
	int32		attempts;		/* made so far, the running one excluded */
	int32		free_count;		/* of them, those that cost no retry */
	TimestampTz first_failed_at;	/* 0 = not before */
	bool		suspect;		/* crashed the server, or may have */
	int32		crash_count;	/* how often it did */
	int32		at_once;		/* transient errors answered by trying at once */
	RedriveFailure *failure;	/* set = not part of the next segment */
} RedriveItem;

/* How a set handler does: what the size of its calls follows from. */
typedef struct RedrivePace
{
	int			length;			/* items of the longest call that succeeded */
	double		items;			/* of the calls of late, and the time they
								 * took */
	double		us;
	double		subxacts;		/* of the function itself, for each item */
	double		recent_rate;	/* of items whose call raised an error: of
								 * late, */
	double		rate;			/* ... and over a longer time */
	double		seen;			/* items that rate is an average of */
} RedrivePace;

/* A claimed chunk and the page of its items that is in memory. */
typedef struct RedriveChunk
{
	MemoryContext cxt;			/* lives as long as the claim */
	RedriveHandler handler;
	int64		chunk_id;
	int64		batch_id;
	int16		part;
	int32		run_no;
	bool		retry;			/* kind = retry */
	bool		crashed;		/* items of the batch crashed the server */
	RedriveItem *list;			/* items of a retry chunk, without payload and
								 * key */
	int			list_items;
	int64		done_to;		/* watermark, as committed */
	int64		to_no;
	int64		lease_token;
	double		failure_rate;	/* decaying average over some fifty items */
	TimestampTz claimed_at;
	int64		done;			/* items committed under this claim */
	bool		started;		/* the handler could be prepared */
	bool		ended;			/* all of it is committed */
	bool		commit_failed;	/* an interval of one item could not be
								 * committed */
	bool		handler_gone;	/* its function or owner was dropped */
	List	   *rules;			/* classification rules that matched */
	bool		commit_each;	/* a commit failed: one item per transaction
								 * up to alone_to */
	int			alone_to;		/* page index up to which segments have one
								 * item */
	RedrivePace pace;			/* of a set handler */
	int			fails_to;		/* a set of the items from page_next or behind
								 * it to this page index failed, 0 = not known */

	MemoryContext page_cxt;
	RedriveItem *page;
	int			page_items;
	bool		suspects;		/* the page has some */
	int			page_next;		/* first item of the page that is not
								 * committed */
} RedriveChunk;

/* One commit interval. */
typedef struct RedriveInterval
{
	MemoryContext cxt;
	TimestampTz started_at;
	int			first;			/* index in the page */
	int			end;			/* settled up to here (exclusive) */
	bool		stop;			/* record what is settled and end the interval */
	bool		replay;			/* an item behind these failed: they are run
								 * again, whatever the time */
	char	   *pause_reason;	/* set: pause the batch too */
} RedriveInterval;

#endif							/* REDRIVE_BATCH_H */
