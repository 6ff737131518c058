/*-------------------------------------------------------------------------
 *
 * suspect.h
 *	  Items that may crash the server.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SUSPECT_H
#define REDRIVE_SUSPECT_H

#include "flow/batch.h"

/* An item that crashed the server so often is not run again. */
#define MAX_CRASHES 2

extern void redrive_mark_suspects(RedriveChunk *chunk);
extern int	redrive_next_suspect(RedriveChunk *chunk, int from);

#endif							/* REDRIVE_SUSPECT_H */
